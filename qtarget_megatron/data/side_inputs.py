"""Per-token side inputs of an objective: from a record's fields to numbers, and how an importance weight is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qtarget_megatron.data.forms import FIELDS
from qtarget_megatron.data.messages import is_finite_number, shown

# The side input that an answer's own weight belongs to.
WEIGHT = "weight"
_PREFIX = "input "
# 1 for a token of the prompt, 0 for one of an answer: no field of a record. Where it is asked for, prompts are targets.
IS_PROMPT = "is_prompt"
_WHERE_FROM = {
    "old_log_prob": "qtarget score computes it",
    WEIGHT: "add it, to the record or its answers, or let qtarget score --reference-hf compute importance weights",
}


def batch_key(name: str) -> str:
    """What items and collated batches hold the side input under: no part of the data set's own has such a key."""
    return f"{_PREFIX}{name}"


def input_name(key: str) -> str | None:
    """The side input that batch_key makes a key of; None for a key of anything else."""
    return key.removeprefix(_PREFIX) if key.startswith(_PREFIX) else None


def read_side_inputs(
    record: dict[str, Any],
    names: Sequence[str],
    supervised: np.ndarray,
    *,
    truncated: bool,
    answer_weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """A record's fields of these names, float64 [n] like supervised (bool [n]), 0 where not supervised.

    A field is a number (true and false are 1 and 0), which every supervised token gets, or a list with one number per
    supervised token, in order. Where no token is supervised the field may be missing.

    truncated:      the sample has been cut, so that the list may be longer; its rest is cut likewise.
    answer_weights: float64 [n], what each token's answer counts, by which "weight" is multiplied; that field may then
                    be missing too. None where no answer says it.

    Raises ValueError for a missing field, another number of entries, anything that is no finite number, and a name that
    is another part of the record.
    """
    if taken := sorted(FIELDS.intersection(names)):
        raise ValueError(f"an objective's token_inputs cannot be named {', '.join(taken)}: rename it")
    inputs = {name: np.zeros(len(supervised)) for name in names}
    if count := int(supervised.sum()):
        for name, values in inputs.items():
            if name != WEIGHT or answer_weights is None:
                values[supervised] = _read(record, name, count, truncated)
            elif record.get(name) is None:
                values[supervised] = answer_weights[supervised]
            else:
                values[supervised] = _read(record, name, count, truncated) * answer_weights[supervised]
    return inputs


def _read(record: dict[str, Any], name: str, count: int, truncated: bool) -> np.ndarray:
    if name not in record:
        hint = _WHERE_FROM.get(name, "add a number, or a list with one number per supervised token")
        raise ValueError(f'the objective needs "{name}", this record has none: {hint}')
    value = record[name]
    entries = value if isinstance(value, list) else [value] * count
    if len(entries) < count or (len(entries) > count and not truncated):
        numbers = f"{'at least ' if truncated else ''}{count} number{'s' if count > 1 else ''}"
        raise ValueError(f'"{name}": expected a number or {numbers} (one per supervised token), got {len(entries)}')
    for position, entry in enumerate(entries):
        if not is_finite_number(entry):
            where = f' at entry {position} of "{name}"' if isinstance(value, list) else ""
            raise ValueError(f'"{name}": expected a finite number or a list of them, got {shown(entry)}{where}')
    return np.array(entries[:count], dtype=np.float64)


def importance_weight(
    log_p: Sequence[float], log_p_reference: Sequence[float], *, temperature: float = 1.0, maximum: float = 16.0
) -> float:
    """The weight of a sample in iw-SFT (arXiv 2507.12856), from log-probabilities in nats of its supervised tokens.

        weight = clamp(exp(temperature * mean_t(log_p[t] - log_p_reference[t])), 0, maximum)

    Raises ValueError where the sequences are empty, differ in length or hold anything but finite numbers, and for a
    temperature or a maximum that is no finite number (the maximum: above 0).
    """
    check_weight_options(temperature, maximum)
    if not 0 < len(log_p) == len(log_p_reference):
        raise ValueError(
            "importance_weight: expected as many log-probabilities as reference ones, at least one, got "
            f"{len(log_p)} and {len(log_p_reference)}"
        )
    if not np.isfinite([log_p, log_p_reference]).all():
        raise ValueError("importance_weight: expected finite log-probabilities, got NaN or infinity")
    exponent = temperature * float(np.mean(np.subtract(log_p, log_p_reference, dtype=np.float64)))
    # Compared as logarithms: exp overflows where the weight is clamped anyway.
    return maximum if exponent >= math.log(maximum) else math.exp(exponent)


def check_weight_options(temperature: float, maximum: float) -> None:
    """Raise ValueError for a temperature or a maximum that importance_weight refuses."""
    if not math.isfinite(temperature):
        raise ValueError(f"temperature: expected a finite number, got {temperature}")
    if not 0 < maximum < math.inf:
        raise ValueError(f"maximum weight: expected a finite number above 0, got {maximum}")
