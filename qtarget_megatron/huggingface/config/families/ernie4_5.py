"""ERNIE 4.5, dense: a Llama whose rotary embedding is that of neighbouring pairs."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    qkv_bias="use_bias",
    output_bias="use_bias",
    mlp_bias="use_bias",
    rotary_interleaved=True,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
