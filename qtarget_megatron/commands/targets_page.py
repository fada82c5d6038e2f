"""The page that inspect_targets writes: one file, no request to anywhere, text never read as markup."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from qtarget_megatron.commands.targets_picture import TRUST_COLOURS

TEMPLATE = Path(__file__).with_name("targets_page.html")
COLUMNS = [
    ("mean_loss", "mean loss", "value of the objective, in nats"),
    ("mean_trust", "trust c_y", "share of the label in Q, mean"),
    ("mean_residual_mass", "residual mass", "share of the objective's residuals in Q, mean"),
    ("mean_total_mass", "mass M", "c_y + residual mass, mean; 1 - M of the model stays as it is"),
    ("mean_moved_mass", "moved mass", "half the sum of |Q - p| = half the L1 norm of the logit gradient, mean"),
    ("mean_label_probability", "Q(y)", "the label's probability under Q, mean"),
    ("low_trust_share", "low trust", "share of the tokens whose trust is below the bound"),
]


def page(report: dict[str, Any]) -> str:
    """The page of inspect_targets' report, its text made visible and its objectives labelled."""
    teacher = f", teacher {report['teacher']}" if report["teacher"] else ""
    shown, supervised = report["num_tokens"], report["supervised_tokens"]
    count = f"{shown} supervised tokens" if shown == supervised else f"first {shown} of {supervised} supervised tokens"
    cut = ", cut to the sequence length" if report["truncated"] else ""
    parts = {
        "TITLE": html.escape(f"Targets of {report['model']}"),
        "MODEL": html.escape(f"{report['model']}{teacher}"),
        "SOURCE": html.escape(f"{report['source']}: {count}{cut}"),
        "TABLE": _table(report),
        "DATA": _embedded({**report, "colours": TRUST_COLOURS}),
    }
    # Split, not replaced in turn: what is filled in is never searched for a mark.
    pieces = TEMPLATE.read_text(encoding="utf-8").split("@@")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _table(report: dict[str, Any]) -> str:
    heads = "".join(
        f'<th scope="col" title="{html.escape(text)}">{html.escape(name)}</th>' for _, name, text in COLUMNS
    )
    rows = []
    for index, row in enumerate(report["objectives"]):
        cells = "".join(f"<td>{_cell(key, row[key])}</td>" for key, _, _ in COLUMNS)
        name = html.escape(row["label"])
        rows.append(f'<tr data-objective="{index}"><th scope="row">{name}</th>{cells}</tr>')
    notes = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for _, name, text in COLUMNS)
    return (
        f'<table><thead><tr><th scope="col">objective</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f"<details><summary>What the columns are</summary><dl>{notes}</dl>"
        f"<p>low trust: below {report['low_trust']:g}. Means are over the supervised tokens shown.</p></details>"
    )


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.1%}" if key.endswith("_share") else f"{value:.4f}"


def _embedded(data: Any) -> str:
    """JSON in which nothing can end the script element that holds it."""
    text = json.dumps(_rounded(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_rounded(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data
