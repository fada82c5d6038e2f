"""Fine-tuning runs for tests: a student, a teacher and data on disk, and many runs in one launch of ranks."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from checkpoint_models import corrections
from megatron_reset import reset
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import encode

SEQ_LENGTH, TRAIN_ITERS = 32, 4
COMMON = [
    *("--seq-length", SEQ_LENGTH, "--micro-batch-size", 1, "--global-batch-size", 8),
    *("--train-iters", TRAIN_ITERS, "--lr", 1e-3, "--min-lr", 1e-3, "--lr-decay-style", "constant"),
    # Above the rounding of gradients: see noise_floor.py.
    *("--clip-grad", 1.0, "--adam-eps", 1e-5, "--log-interval", 1, "--seed", 7, "--distributed-timeout-minutes", 10),
    # A step is a number of samples; test_packing.py has rows of several.
    "--no-pack",
]

# An objective whose loss is NaN where a record has "spoiled": 1.
SPOILED = """
import torch
from qtarget_megatron import objectives

@objectives.register("spoiled")
def spoiled():
    def evaluate(stats, inputs):
        return stats.weighted_nll(stats.p).where(inputs["spoiled"] == 0, torch.nan), stats.p, ()

    return objectives.Objective(evaluate, token_inputs=("spoiled",))
"""


def write_models(folder: Path) -> None:
    """untied: a Llama; tied: a Qwen3 with qk norms and 2 key/value heads; teacher: another width, depth and tie; deep:
    a teacher of the student's depth; odd: one of 3 layers; experts: a Qwen3-MoE whose first layer has one MLP;
    weighted: a Qwen2-MoE, with a shared expert; sinks: a gpt-oss; latent: a DeepSeek-V3, whose first layer has one
    MLP."""
    sizes = dict(vocab_size=vocabulary(), max_position_embeddings=64, num_attention_heads=4)
    models = {
        "untied": ("Llama", dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4)),
        "tied": (
            "Qwen3",
            dict(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_key_value_heads=2,
                head_dim=16,
            )
            | dict(tie_word_embeddings=True),
        ),
        "teacher": (
            "Llama",
            dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, tie_word_embeddings=True),
        ),
    }
    models["deep"] = ("Llama", dict(hidden_size=48, intermediate_size=40, num_hidden_layers=4))
    models["odd"] = ("Llama", dict(hidden_size=40, intermediate_size=48, num_hidden_layers=3))
    models["experts"] = (
        "Qwen3Moe",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_key_value_heads=2, head_dim=16)
        | dict(mlp_only_layers=[0], moe_intermediate_size=20, num_local_experts=4, num_experts_per_tok=2),
    )
    models["weighted"] = (
        "Qwen2Moe",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_key_value_heads=2, mlp_only_layers=[1])
        | dict(moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=24),
    )
    models["sinks"] = (
        "GptOss",
        dict(hidden_size=32, intermediate_size=20, num_hidden_layers=4, num_key_value_heads=2, head_dim=8)
        | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=6, swiglu_limit=1.0, pad_token_id=None),
    )
    models["latent"] = (
        "DeepseekV3",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=4)
        | dict(q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8)
        | dict(n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=20)
        | dict(first_k_dense_replace=1, num_nextn_predict_layers=0),
    )
    generator = torch.Generator().manual_seed(11)
    for name, (family, extra) in models.items():
        write_model(folder / name, family, sizes | extra, generator)


def vocabulary() -> int:
    """More tokens than the tokenizer has, and a number that no tensor-parallel size divides: every layout pads."""
    return len(byte_tokenizer(CHATML, eos="<|im_end|>")) + 5 | 1


def write_model(folder: Path, family: str, config: dict, generator: torch.Generator) -> None:
    """A random model of transformers in float32, with the tokenizer of write_data's conversations."""
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else 1 + noise * 0.1)
        for buffer in corrections(model):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    byte_tokenizer(CHATML, eos="<|im_end|>").save_pretrained(folder)


def write_data(path: Path, count: int, seed: int) -> None:
    """Conversations of uneven length, so that ranks and micro-batches hold different numbers of supervised tokens.

    Every record has the side inputs of the published objectives: one weight, and a list of each other one.
    """
    draw = random.Random(seed)
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    words = "what is the capital of France Paris 1 + 2 = 3 user".split()
    with path.open("w") as file:
        for _ in range(count):
            turns = [
                {"role": "user", "content": " ".join(draw.choices(words, k=draw.randint(1, 3)))},
                {
                    "role": "assistant",
                    "content": " ".join(draw.choices(words, k=draw.randint(1, 5))),
                },
            ]
            record = {"messages": turns, "weight": draw.uniform(0.2, 2)}
            num_tokens = int(encode(tokenizer, record, seq_length=1000).supervised.sum())
            record["critical"] = [draw.random() < 0.5 for _ in range(num_tokens)]
            # A random model of 265 tokens: ratios on both sides of the clip.
            record["old_log_prob"] = [draw.uniform(-7, -5) for _ in range(num_tokens)]
            file.write(json.dumps(record) + "\n")


def run_all(runs: dict[str, list], folder: str, common=COMMON) -> dict[str, dict]:
    """Fine-tune once for each entry, in this process group; called on every rank (by launching.run_ranks).

    Returns for each run its exit code, what was printed, and the TensorBoard scalars {tag: [value of each step]} (on
    the last rank, which writes them).
    """
    from qtarget_megatron import finetune

    results = {}
    for name, words in runs.items():
        board = Path(folder) / f"board-{name}"
        argv = [*map(str, common), "--tensorboard-dir", str(board), *map(str, words)]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = finetune.main(argv)
            except SystemExit as stop:  # argparse, and Megatron's --exit-interval
                code = stop.code
        # Megatron's last rank writes them.
        last = dist.get_rank() == dist.get_world_size() - 1
        written = scalars(board) if last and board.exists() else {}
        results[name] = {"code": code, "printed": printed.getvalue(), "scalars": written}
        reset()
    return results


def run_tool(name: str, words: list) -> tuple[int, str]:
    """Exit code and output of a command in this process group; called on every rank (by launching.run_ranks)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = importlib.import_module(f"qtarget_megatron.commands.{name}").main([str(word) for word in words])
    reset()
    return code, printed.getvalue()


def scalars(board: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
