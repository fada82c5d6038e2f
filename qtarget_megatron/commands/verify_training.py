"""qtarget verify --train: what it prints; run as a module, the process that trains on one rank."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

# A bound above which a gradient that is half or twice as large may go unseen.
_BLIND = 0.5


def verify(words: Sequence[str], *, timeout: float, keep: Path | None) -> int:
    """Verify a fine-tuning of these words on all ranks; the exit code: 0 all well, 1 a difference."""
    from qtarget_megatron.finetune import fine_tune
    from qtarget_megatron.megatron.runtime.ranks import print_once
    from qtarget_megatron.megatron.verify.training import verify_training

    verdict = verify_training(words, fine_tune, timeout=timeout, keep=keep, begin=_begin)
    for line in _table(verdict):
        print_once(line)
    return 0 if verdict.ok else 1


def _begin(request, arch, is_known: bool) -> None:
    from qtarget_megatron.megatron.runtime.ranks import print_once

    args, sizes, source = request.run.args, request.sizes, f"{request.run.hf_model}/config.json"
    experts = "" if arch.experts is None else f", {arch.experts.count} experts"
    print_once(
        f"model      {source} made small: {arch.family}, {arch.num_layers} layers{experts}, hidden size "
        f"{arch.hidden_size}"
    )
    print_once(
        f"layout     {request.in_words()} on {args.world_size} rank(s); 2 steps of {sizes.batch} rows of "
        f"{sizes.row_length} tokens{''.join(f' {word}' for word in request.precision)}"
    )
    known = " (known from an earlier verification)" if is_known else ""
    print_once(f"reference  one rank, float32{known}")
    if request.left_out:
        print_once(f"left out   {' '.join(request.left_out)}")
    print_once("")


def _table(verdict) -> list[str]:
    """A line for each scalar and each part of the model, with its worst tensor."""
    width = max(len(_part(difference.name)) for difference in verdict.tensors)
    width = max([width, *(len(difference.what) for difference in verdict.scalars)])
    lines = [f"{'':{width}}  difference     bound  rank"]
    lines += [_line(width, difference.what, difference) for difference in verdict.scalars]
    for kind, of_kind in groupby(verdict.tensors, lambda difference: difference.what):
        lines.append(f"{kind}")
        for part, differences in groupby(of_kind, lambda difference: _part(difference.name)):
            worst = max(differences, key=lambda difference: difference.off / difference.bound)
            lines.append(f"{_line(width, part, worst)} {worst.name.removeprefix(part).lstrip('.')}")
    return [*lines, "", *_judgement(verdict)]


def _line(width: int, what: str, difference) -> str:
    verdict = "ok  " if difference.ok else "FAIL"
    return f"{what:{width}}  {difference.off:10.1e}  {difference.bound:8.1e}  {difference.rank:4}  {verdict}"


def _part(name: str) -> str:
    """The layer of a tensor, or the module where it is in none."""
    found = re.match(r".*?\blayers\.\d+", name)
    return found[0] if found else name.rpartition(".")[0]


def _judgement(verdict) -> Iterator[str]:
    layout = verdict.words.in_words()
    if blind := [difference for difference in verdict.tensors if difference.bound > _BLIND]:
        yield (
            f"note: rounding alone changes {len(blind)} of {len(verdict.tensors)} tensors so much, first "
            f"{blind[0].name} ({blind[0].what}), that a difference of {_BLIND:g} of their size would not be seen"
        )
    if verdict.ok:
        yield f"verified: {layout} trains as one rank does ({len(verdict.tensors)} tensors, 2 steps)"
        return
    wrong = [difference for difference in (*verdict.tensors, *verdict.scalars) if not difference.ok]
    first = wrong[0]
    if first.name:
        yield (
            f"FAIL: {first.name} is the first parameter, in the model's order, whose {first.what} differs: off by "
            f"{first.off:.2g} of its size (bound {first.bound:.1e}) on rank {first.rank}, {first.ratio:.3f} times the "
            "reference's along it"
        )
        counts = []
        for kind, of_kind in groupby(verdict.tensors, lambda difference: difference.what):
            ok = [difference.ok for difference in of_kind]
            counts.append(f"{kind}: {ok.count(False)} of {len(ok)}")
        yield f"      that differ: {', '.join(counts)}"
    else:
        yield f"FAIL: {first.what} is off by {first.off:.1e} (bound {first.bound:.1e}), while all tensors agree"
    if not verdict.is_sound:
        yield "one rank in the precision of the layout is off as well: it is not the layout alone"
    yield from _hint({difference.what for difference in wrong})
    yield f"NOT verified: {layout} does not train as one rank does"


def _hint(wrong: set[str]) -> Iterator[str]:
    """Where to look, by what is right."""
    if "supervised tokens of step 1" in wrong:
        yield "the ranks do not read the samples that one rank reads"
    elif "loss of step 1" in wrong:
        yield "the loss of step 1 differs: look at the forward pass"
    elif "gradient of step 1" in wrong:
        yield "the loss of step 1 is right: look at the backward pass, and at what adds up gradients over ranks"
    elif "gradient norm of step 1" in wrong:
        yield "gradients of step 1 are right, their norm is not: look at what clips gradients"
    else:
        yield "step 1 is right up to its gradients: look at the optimizer's step, and at what hands out its weights"


def main(argv: list[str] | None = None) -> int:
    """Be the process that trains on one rank, for the job in a file."""
    from qtarget_megatron.finetune import fine_tune
    from qtarget_megatron.megatron.faults.ending import exit_code
    from qtarget_megatron.megatron.verify.training import run_job

    (path,) = sys.argv[1:] if argv is None else argv

    def job() -> int:
        run_job(path, fine_tune)
        return 0

    return exit_code("verify, one rank", job)


if __name__ == "__main__":
    from qtarget_megatron.megatron.faults import ending

    ending.run("verify, one rank", main)
