"""What transformers computes from a Hugging Face directory, without running any code of that directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtarget_megatron.huggingface.compare.hidden_states import Place, recorded


@torch.no_grad()
def transformers_logits(directory: Path, tokens: list[int], states: dict[Place, Tensor] | None = None) -> Tensor:
    """Logits of one sequence by transformers, float32 [s, vocab_size], on the CPU.

    states: is filled with what the parts of the decoder return, [s, hidden size]; of a decoder whose parts have other
    names than the common ones, with what it has.

    ValueError where transformers cannot load the directory, or a token is outside of the model's vocabulary.
    """
    # Imported late: seconds, which only those spend who compare with transformers.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers cannot load a model from {directory}: {reason}") from error
    if max(tokens) >= model.config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer wrote id {max(tokens)}, the model has a vocabulary of "
            f"{model.config.vocab_size}: config.json and tokenizer do not belong together"
        )
    with recorded({} if states is None else _places(model.base_model)) as found:
        logits = model.eval()(torch.tensor([tokens], device="cpu")).logits[0].float()
    if states is not None:
        states |= {place: value[0].float() for place, value in found.items()}
    return logits


def _places(decoder: torch.nn.Module) -> dict[Place, torch.nn.Module]:
    layers = getattr(decoder, "layers", ())
    places = {
        Place.embedding(): getattr(decoder, "embed_tokens", None),
        Place.final_norm(len(layers)): getattr(decoder, "norm", None),
    }
    for number, layer in enumerate(layers):
        places[Place.of_layer(number, "attention")] = getattr(layer, "self_attn", None)
        places[Place.of_layer(number, "MLP")] = getattr(layer, "mlp", None)
        places[Place.of_layer(number, "output")] = layer
    return {place: module for place, module in places.items() if module is not None}
