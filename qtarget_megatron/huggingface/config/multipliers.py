"""Fixed numbers that parts of a decoder are multiplied by: what config.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtarget_megatron.huggingface.config.config_file import positive_number


@dataclass(frozen=True)
class Multipliers:
    """What parts of a decoder are multiplied by.

    embedding: of the embedding's rows.
    residual:  of what attention and MLP add to the hidden states.
    attention: of the scores q k, in place of 1 / sqrt(head_dim).
    logits:    of the logits.
    """

    embedding: float
    residual: float
    attention: float
    logits: float


def read_multipliers(config: Mapping[str, Any]) -> Multipliers:
    """Those of a Granite's config; ValueError for one that is no positive number."""
    return Multipliers(
        embedding=positive_number(config, "embedding_multiplier"),
        residual=positive_number(config, "residual_multiplier"),
        attention=positive_number(config, "attention_multiplier"),
        logits=1 / positive_number(config, "logits_scaling"),
    )
