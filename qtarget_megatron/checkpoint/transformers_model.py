"""What transformers computes from a Hugging Face directory, without running any code of that directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


@torch.no_grad()
def transformers_logits(directory: Path, tokens: list[int]) -> Tensor:
    """Logits of one sequence by transformers, float32 [s, vocab_size], on the CPU.

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
    return model.eval()(torch.tensor([tokens], device="cpu")).logits[0].float()
