"""What a comparison with transformers found, as lines that tell a person where to look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from qtarget_megatron.huggingface.compare.agreement import Agreement, StateAgreement
from qtarget_megatron.huggingface.compare.hidden_states import Place

# Layers shown before and behind the first that differs, where there are many.
_AROUND, _ALL_LAYERS = 2, 8
_CAUSES = {
    "embedding": "model.embed_tokens.weight: another model's, damaged, or rows in another order",
    "MLP": "post_attention_layernorm (weight or epsilon), gate_proj and up_proj exchanged, down_proj, the activation",
    "output": "what is added to the hidden states: the residual connection, or a norm behind attention or MLP",
    "final norm": "model.norm: weight or epsilon",
    "logits": "lm_head.weight, or tie_word_embeddings",
}
_ROPE = "the first token, which rope does not turn, agrees: rope base or scaling, q_proj, k_proj, q_norm or k_norm"
_ATTENTION = "input_layernorm (weight or epsilon), v_proj, o_proj, or the order of q, k and v"
_NOWHERE = "hidden states differ a little more from layer to layer: rounding (another dtype, TF32) rather than a weight"


def report_lines(found: Agreement, tolerance: float, text: Callable[[int], str]) -> list[str]:
    """The measures; where the logits differ by more than the tolerance, also the worst tokens, and where in the model
    the difference begins. text: of a token id."""
    shown = _table(
        [
            ("tokens", f"{found.num_tokens}"),
            ("largest difference of two logits", f"{found.max_difference:.3g} (tolerance {tolerance:g})"),
            ("same token ranked first", f"{found.argmax_agreement:.2%}"),
            ("KL(transformers to Megatron), mean", f"{found.kl_mean:.3g} nats"),
            ("KL(transformers to Megatron), largest", f"{found.kl_max:.3g} nats"),
        ]
    )
    if found.max_difference <= tolerance:
        return shown
    shown += ["", "worst tokens", *_worst(found, text)]
    if found.states:
        first = found.first_divergence()
        shown += ["", "relative difference of hidden states, largest over tokens", *_states(found.states, first)]
        shown += ["", f"first divergence: {_verdict(first)}"]
    return shown


def _worst(found: Agreement, text: Callable[[int], str]) -> list[str]:
    heads = ("position", "token", "next in the text", "transformers' first", "Megatron's first", "logits", "KL")
    rows = [
        (
            f"{token.position}",
            text(token.token),
            "-" if token.label is None else text(token.label),
            text(token.expected),
            text(token.actual),
            f"{token.difference:.3g}",
            f"{token.kl:.3g}",
        )
        for token in found.worst
    ]
    return _table([heads, *rows])


def _states(states: Sequence[StateAgreement], first: StateAgreement | None) -> list[str]:
    by_place = {state.place: state.difference for state in states}
    layers = sorted({place.layer for place in by_place if place.part in ("attention", "MLP", "output")})
    outer = [state for state in states if state.place.layer not in layers]
    at = first.place.layer if first is not None and first.place.layer in layers else layers[-1] if layers else 0
    near = [layer for layer in layers if abs(layer - at) <= _AROUND or len(layers) <= _ALL_LAYERS]
    rows: list[tuple[str, ...]] = [("", "attention", "MLP", "output")]
    for state in outer:
        if state.place.layer < 0:
            rows.append((str(state.place), "", "", f"{state.difference:.2g}"))
    for layer in near:
        places = [Place.of_layer(layer, part) for part in rows[0][1:]]
        cells = [f"{by_place[place]:.2g}" if place in by_place else "-" for place in places]
        rows.append((f"layer {layer}", *cells))
    for state in outer:
        if state.place.layer >= 0:
            rows.append((str(state.place), "", "", f"{state.difference:.2g}"))
    hidden = len(layers) - len(near)
    return [*_table(rows), *([f"({hidden} layers not shown)"] if hidden else [])]


def _verdict(first: StateAgreement | None) -> str:
    if first is None:
        return f"none ({_NOWHERE})"
    cause = _CAUSES.get(first.place.part)
    if cause is None:
        # Beside infinity every number is small.
        agrees = math.isfinite(first.difference) and first.at_first <= first.difference / 100
        cause = _ROPE if agrees else _ATTENTION
    return f"{first.place} ({cause})"


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
