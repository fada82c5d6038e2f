"""A hook of mkdocs: below each objective's heading in docs/objectives.md what the package itself says of it: formula,
masses, gradient, parameters, what it reads, its source, and a picture of what it does to a token."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import math
import re
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from mkdocs.structure.files import File, Files

from qtarget_megatron import Objective, Samples, objectives, target_distribution

ROOT = Path(__file__).resolve().parents[2]
PAGE = "objectives.md"
SOURCES = ("published.py", "whole_samples.py", "extras.py", "divergences.py")
# The drawn token: a vocabulary of this size, the other tokens' logits, the teacher's probability of the label, side
# inputs.
VOCABULARY, SHOWN = 32, 6
DECAY = 0.35
TEACHER_LABEL = 0.4
INPUTS = {"weight": 1.5, "critical": 1.0, "is_prompt": 0.0, "old_log_prob": math.log(0.4)}
# The paragraph of a docstring that defines an objective: a sentence ends where two blanks or a line's end follow.
_DEFINITION = re.compile(r"loss = (?P<loss>.*?)[.;]\s+(?P<masses>c_y = .*?)\.(?= {2}|\n|$)(?P<words>.*)", re.DOTALL)
# p(y) in the picture's bars.
UNLIKELY = 0.15
INK, LABEL, RESIDUAL, SFT = "#37474f", "#1565c0", "#ef6c00", "#9e9e9e"


def on_files(files: Files, config) -> Files:
    for name in objectives.names():
        files.append(File.generated(config, f"pictures/{name}.svg", content=picture(objectives.example(name))))
    return files


def on_page_markdown(markdown: str, page, **others) -> str | None:
    return completed(markdown) if page.file.src_uri == PAGE else None


def completed(markdown: str) -> str:
    """The page with a description at the end of each objective's section."""
    parts = re.split(r"^(?=#{1,3} )", markdown, flags=re.MULTILINE)
    names = set(objectives.names())
    for i, part in enumerate(parts):
        name = part.partition("\n")[0].removeprefix("### ")
        if name in names:
            names.remove(name)
            parts[i] = f"{part.rstrip()}\n\n{description(name)}\n\n"
    if names:
        raise ValueError(f"{PAGE} has no section '### NAME' for {', '.join(sorted(names))}: write one")
    return "".join(parts)


def description(name: str) -> str:
    """One objective in Markdown."""
    objective, factory = objectives.example(name), getattr(objectives, name.replace("-", "_"))
    summary, definition, *more = inspect.cleandoc(factory.__doc__).split("\n\n")
    found = _DEFINITION.match(definition)
    if found is None:
        raise ValueError(f"objective {name!r}: expected 'loss = ...; c_y = ...' in its docstring, got {definition!r}")
    words, _, paper = _line(found["words"]).partition("Source: ")
    lines = [_line(summary), "", f"- loss: `{_line(found['loss'])}`", f"- masses: `{_line(found['masses'])}`"]
    lines += [f"- gradient: {_gradient(objective)}", f"- reads {_reads(objective)}"]
    lines.append(f"- during training: {_life(objective)}")
    if paper:
        paper = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
        lines.append(f"- source: {paper.rstrip('.')}")
    lines += ["", *(f"{_line(paragraph)}\n" for paragraph in (words, *more) if paragraph.strip())]
    lines += _parameters(factory)
    lines += [f"![Masses, pull and target of {name}](pictures/{name}.svg)", ""]
    path, code = _source(name)
    lines += [f'??? quote "{path}"', "", "    ```python", *(f"    {line}" for line in code.splitlines()), "    ```"]
    return "\n".join(lines)


def _line(text: str) -> str:
    return " ".join(text.split())


def _gradient(objective: Objective) -> str:
    """The logit gradient with the objective's own residuals."""
    names = ["c_r"] if len(objective.residuals) == 1 else [f"c_{i + 1}" for i in range(len(objective.residuals))]
    if not names:
        return "`g_k = c_y (p_k - [k = y])`"
    residuals = [name.replace("c", "r", 1) if name != "c_r" else "r" for name in names]
    pulls = " - ".join(f"{mass} {residual}_k" for mass, residual in zip(names, residuals, strict=True))
    meanings = "; ".join(
        f"`{residual} = {_softmax(*pair)}`" for residual, pair in zip(residuals, objective.residuals, strict=True)
    )
    divergence = objective.divergence
    of_divergence = "" if divergence is None else " + d p_k (h_k - E_p h)"
    shown = f" at {', '.join(f'{key}={value:g}' for key, value in objective.parameters if isinstance(value, float))}"
    mixed = any(pair not in ((0.0, 0.0), (0.0, 1.0)) for pair in objective.residuals)
    if divergence is not None and objective.name != "mixed-kl":
        # A residual without a mass: it is there for the divergence.
        return f"`g_k = c_y (p_k - [k = y]){of_divergence}`, `l = log p - log r`, {meanings}"
    mass = f"(c_y + {' + '.join(names)}) p_k" if of_divergence else "M p_k"
    total = "" if of_divergence else f", `M = c_y + {' + '.join(names)}`"
    return f"`g_k = {mass} - c_y [k = y] - {pulls}{of_divergence}`{total}, {meanings}{shown if mixed else ''}"


def _softmax(a: float, b: float) -> str:
    if (a, b) == (0.0, 0.0):
        return "1/V"
    terms = [f"{name}" if factor == 1 else f"{factor:.3g} {name}" for factor, name in ((a, "z"), (b, "t")) if factor]
    return f"softmax({' + '.join(terms)})"


def _reads(objective: Objective) -> str:
    """What it needs besides logits and labels."""
    found = [f"the field `{name}` of each record" for name in objective.token_inputs]
    if objective.refresh:
        found.append("the trained model as it was some steps ago")
    elif objective.needs_teacher:
        found.append("a [second model](teachers.md)")
    statistics = {
        "sum_k p_k^2": objective.collision,
        f"the {objective.top_k} largest logits": objective.top_k,
        "the entropy of its residuals": objective.residual_entropy,
        "the residual's probability of the label": objective.residual_label,
    }
    asked = [name for name, is_asked in statistics.items() if is_asked]
    if asked:
        found.append(f"one more statistic of the row ({', '.join(asked)})")
    return " and ".join(found) or "nothing but logits and labels"


def _life(objective: Objective) -> str:
    """Which of the things that it reads change while the model is trained."""
    found = [f"`{name}` stays as the data has it" for name in objective.token_inputs]
    if objective.refresh:
        found.append(f"the second model is the trained one, copied anew at every step that {objective.refresh} divides")
    elif objective.needs_teacher:
        found.append("the second model is frozen, so that a cache of it serves as well")
    if objective.needs_samples:
        found.append("what is of whole samples is of the model as it is in each step")
    return "; ".join(found) or "everything is of the model as it is in each step"


def _parameters(factory) -> list[str]:
    """A table of its parameters."""
    parameters = inspect.signature(factory).parameters.values()
    if not parameters:
        return []
    rows = [
        f"| `{p.name}` | {'must be given' if p.default is inspect.Parameter.empty else f'`{p.default}`'} |"
        for p in parameters
    ]
    return ["| parameter | default |", "|---|---|", *rows, ""]


def _source(name: str) -> tuple[str, str]:
    """(path, text) of the function that makes an objective."""
    for file in SOURCES:
        path = ROOT / "qtarget_megatron" / "objectives" / file
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name == name.replace("-", "_"):
                lines = text.splitlines()[node.decorator_list[0].lineno - 1 : node.end_lineno]
                return path.relative_to(ROOT).as_posix(), "\n".join(lines)
    raise ValueError(f"no function of {SOURCES} makes the objective {name!r}")


# ---- the picture


def picture(objective: Objective) -> str:
    """SVG: masses and the pull on the label's logit against p(y), and the target of one unlikely token."""
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    with matplotlib.rc_context(style | {"svg.hashsalt": "qtarget"}):  # salt: the same picture each time
        figure = Figure(figsize=(9, 2.5), layout="constrained")
        masses, pull, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
        p = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
        _draw_masses(masses, objective, p)
        _draw_pull(pull, objective, p)
        _draw_target(bars, objective)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _draw_masses(axes, objective: Objective, p: torch.Tensor) -> None:
    target = _targets(objective, p)
    axes.plot(p, target.label_mass, color=LABEL, label="label mass $c_y$")
    if objective.residuals:
        axes.plot(p, target.residual_mass, color=RESIDUAL, linestyle="--", label="residual mass")
    axes.set(xlabel="p(y)", title="masses", xlim=(0, 1), ylim=_limits(target.label_mass, target.residual_mass))
    axes.legend(frameon=False)


def _draw_pull(axes, objective: Objective, p: torch.Tensor) -> None:
    pull = -_targets(objective, p).gradient[:, 0]
    axes.axhline(0, color=INK, linewidth=0.5)
    if objective.name != "sft":
        axes.plot(p, 1 - p, color=SFT, linestyle=":", label="sft")
    axes.plot(p, pull, color=LABEL, label=objective.name)
    axes.set(xlabel="p(y)", title="pull on the label's logit, $-g_y$", xlim=(0, 1), ylim=_limits(pull, 1 - p))
    axes.legend(frameon=False)


def _draw_target(axes, objective: Objective) -> None:
    target = _targets(objective, torch.tensor([UNLIKELY], dtype=torch.float64))
    x = range(SHOWN)
    axes.axhline(0, color=INK, linewidth=0.5)
    axes.bar([i - 0.21 for i in x], target.p[0, :SHOWN].tolist(), 0.4, color=SFT, label="p")
    axes.bar(
        [i + 0.21 for i in x],
        target.q[0, :SHOWN].tolist(),
        0.4,
        color=[LABEL] + [RESIDUAL] * (SHOWN - 1),
        label="Q = p - g",
    )
    if objective.needs_teacher:
        axes.plot(x, _teacher().softmax(-1)[:SHOWN].tolist(), "_", color=INK, markersize=16, label="second model")
    axes.set_xticks(x, ["y", *(f"{i}" for i in range(2, SHOWN + 1))])
    axes.set(xlabel="token", title=f"target where p(y) = {UNLIKELY:g}", ylim=_limits(target.q[0, :SHOWN], target.p[0]))
    axes.legend(frameon=False)


def _limits(*values: torch.Tensor) -> tuple[float, float]:
    low, high = (float(bound) for bound in torch.cat([part.flatten() for part in values]).aminmax())
    low, high = min(low, 0.0), min(max(high, 1.0), 3.0)
    room = 0.06 * (high - low)
    return low - room, high + room


def _targets(objective: Objective, p: torch.Tensor):
    """Target distributions of labels with each of these probabilities; the label is token 0 of the vocabulary."""
    others = _others().expand(len(p), -1)
    label = p.logit() + others.logsumexp(-1)
    return target_distribution(
        objective,
        torch.cat([label[:, None], others], dim=-1),
        torch.zeros(len(p), dtype=torch.int64),
        teacher_logits=_teacher().expand(len(p), -1) if objective.needs_teacher else None,
        token_inputs={name: torch.full_like(p, INPUTS[name]) for name in objective.token_inputs},
        samples=Samples(torch.arange(len(p)), len(p)),
    )


def _others() -> torch.Tensor:
    """Logits of all tokens but the label: each a little less likely than the one before it."""
    return -DECAY * torch.arange(VOCABULARY - 1, dtype=torch.float64)


@functools.cache
def _teacher() -> torch.Tensor:
    """The second model's: surer of the label, and of token 4 in place of token 2."""
    others = _others().clone()
    others[[0, 2]] = others[[2, 0]]
    label = math.log(TEACHER_LABEL / (1 - TEACHER_LABEL)) + others.logsumexp(-1)
    return torch.cat([label[None], others])
