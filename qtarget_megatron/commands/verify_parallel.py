"""Verify the losses on your own cluster, at your own layout: no data and no checkpoint are read.

    # under your launcher, with as many ranks and the layout that training will have
    torchrun --nproc-per-node 8 -m qtarget_megatron.verify --bf16 \\
        --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel

    # two objectives, one with a parameter, over a small vocabulary
    torchrun --nproc-per-node 4 -m qtarget_megatron.verify --tensor-model-parallel-size 4 \\
        --objective dft target-sft:eta=0.3 --vocab-size 1000

    # a whole training: the flags of finetune behind --train; of --hf-model config.json alone is read
    torchrun --nproc-per-node 8 -m qtarget_megatron.verify --train --hf-model DIR --bf16 \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel

Every rank draws the same problem from --seed: hidden states, an output layer whose vocabulary is padded,
labels of which some are ignored, a teacher, and tokens with extreme logits. It computes each objective on
its shard over Megatron's process groups (NCCL where CUDA is found, gloo elsewhere), and compares with the
whole problem computed in float64 by itself, without a group:

    logits       loss and gradient of qtarget_cross_entropy
    fused head   of qtarget_linear_cross_entropy: loss, gradients of the hidden states and of the weight; with
                 --sequence-parallel hidden states are cut along the sequence
    data split   mean loss and the weight's gradient when the data- and context-parallel ranks share the
                 tokens, sums and counts are added up, and the division is by the total

each with a live teacher where the objective reads a second model, the first two also with its 16 largest
probabilities and a uniform tail. The loss must have the same bits on every rank.

Bounds. Loss: |difference| <= 5e-5 max(1, |loss|) for every token, in every dtype, as all logits of the
problem are exact. Gradients: L2 norm of the difference <= 5e-5 + (2 + T) u of the gradient's norm, with T
tensor-parallel ranks and u = 2^-9 (bfloat16), 2^-12 (float16) or 0 (float32): roundings to storage. With
a rank left out of the merge, every row exceeds one of the two at least tenfold.

Prints a table on rank 0, each error with the rank that has the worst. Exit code on every rank: 0 all well,
1 a mismatch, or a rank that failed, 2 bad input. Expert and virtual pipeline parallelism do not touch the
loss and have no flags here. On a CPU the whole takes minutes; a smaller --vocab-size makes it seconds.

--train verifies what this leaves out: all that a fine-tuning with these flags runs through. Two steps of a
small random model, of the family and structure of --hf-model, are trained at the layout on data of its own,
and on one rank on the CPU in float32. Losses, gradient norms, all gradients and the change of all weights
are compared, as whole tensors put together from all ranks. Bounds are measured in the same run: what another
order of summation, and the precision of the layout, do to one rank, times four. The first parameter that
differs is named. Only --keep, --timeout and --train itself are flags of this command then.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qtarget_megatron.commands.parsers import command_parser


def main(argv: list[str] | None = None) -> int:
    """Verify one layout; returns the process's exit code: 0 all well, 1 a mismatch or a failed rank, 2 bad input."""
    from qtarget_megatron.megatron.faults.ending import exit_code

    return exit_code("verify", lambda: _run(command_line().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    _check_own_flags(args)
    if args.train is not None:
        from qtarget_megatron.commands.verify_training import verify

        return verify(args.train, timeout=600.0 if args.timeout is None else args.timeout, keep=args.keep)
    return _verify_losses(args)


def _check_own_flags(args: argparse.Namespace) -> None:
    """ValueError for flags that would not be heeded, with --train or without it."""
    if args.train is None:
        if args.keep is not None:
            raise ValueError("--keep keeps what one rank computes for --train: drop it, or give --train")
        return
    for action in command_line()._actions:
        if action.dest in ("train", "keep", "timeout") or not hasattr(args, action.dest):
            continue
        if getattr(args, action.dest) != action.default:
            flag = action.option_strings[0]
            raise ValueError(f"{flag} stands before --train: the flags of the training, as its layout, follow --train")


def _verify_losses(args: argparse.Namespace) -> int:
    import torch

    from qtarget_megatron import objectives
    from qtarget_megatron.megatron.runtime.ranks import print_once
    from qtarget_megatron.megatron.verify.layout import VerifyOptions, verify
    from qtarget_megatron.megatron.verify.problem import chosen_objectives

    if args.objective_file is not None:
        objectives.register_from_file(args.objective_file)
    chosen = chosen_objectives(args.objective)
    left_out = [] if args.objective else [name for name in objectives.names() if objectives.example(name) is None]
    if not chosen:
        raise ValueError(_how_to_verify(left_out))
    options = VerifyOptions(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        vocab_size=args.vocab_size,
        hidden=args.hidden,
        tokens=args.tokens,
        seed=args.seed,
        backend=args.backend,
        timeout=120.0 if args.timeout is None else args.timeout,
    )
    width = max(len(str(objective)) for objective in chosen)
    kinds = len("fused head, sparse teacher")
    lines = 0

    def show(row) -> None:
        nonlocal lines
        if lines == 0:
            print_once(
                f"{'objective':{width}}  {'kind':{kinds}}  {'loss':>8} {'rank':>4}  {'gradient':>8} {'rank':>4} "
                f"{'of':6}  {f'bounds {row.loss_bound:.1e} {row.gradient_bound:.1e}'}"
            )
        lines += 1
        print_once(
            f"{row.objective:{width}}  {row.kind:{kinds}}  {row.loss:8.1e} {row.loss_rank:4}  {row.gradient:8.1e} "
            f"{row.gradient_rank:4} {row.gradient_of:6}  {'ok' if row.ok else 'FAIL'}"
            f"{f': {row.problem}' if row.problem else ''}"
        )

    verdict = verify(options, chosen, show)
    wrong = sum(not row.ok for row in verdict.rows)
    if verdict.failure:
        print_once(f"FAIL: ended after {len(verdict.rows)} rows: {verdict.failure}")
    elif wrong:
        print_once(f"FAIL: {wrong} of {len(verdict.rows)} rows differ from the dense computation")
    print_once(f"{'verified' if verdict.ok else 'NOT verified'}: {len(chosen)} objective(s) at {verdict.verified}")
    if left_out:
        print_once(_how_to_verify(left_out))
    return 0 if verdict.ok else 1


def _how_to_verify(left_out: list[str]) -> str:
    return (
        f"not verified: {', '.join(left_out)}, with a parameter that has no default: name it, --objective "
        f"{left_out[0]}:KEY=VALUE, or register it with example={{KEY: VALUE}}"
    )


def command_line() -> argparse.ArgumentParser:
    """The parser of its own flags."""
    parser = command_parser("verify", __doc__)

    def number(flag: str, default: int, text: str) -> None:
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: {default})")

    number("--tensor-model-parallel-size", 1, "ranks that share the vocabulary")
    number("--pipeline-model-parallel-size", 1, "pipeline stages; every stage computes the loss here")
    number("--context-parallel-size", 1, "ranks that share a sequence")
    parser.add_argument("--sequence-parallel", action="store_true", help="hidden states cut along the sequence")
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument(
        "--bf16", action="store_true", help="bfloat16 hidden states, weight and logits (default: float32)"
    )
    dtype.add_argument("--fp16", action="store_true", help="float16 in their place")
    parser.add_argument(
        "--objective",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="what to verify (default: every registered objective, parameters at their defaults)",
    )
    parser.add_argument(
        "--objective-file", type=Path, metavar="FILE", help="Python file that registers more objectives"
    )
    number("--vocab-size", 151_936, "true vocabulary; padded to a multiple of 128 on each rank")
    number("--hidden", 64, "width of the hidden states, 16 to 256; the teacher has half of it")
    number("--tokens", 64, "tokens; each rank holds a few float64 matrices of tokens x vocabulary")
    number("--seed", 1, "of the drawn problem")
    parser.add_argument("--backend", default="auto", metavar="B", help="auto, reference, cpp or cuda (default: auto)")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="how long a rank waits for the others before the run ends with exit code 1 (default: 120, with --train "
        "600, for what is trained on one rank too)",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="with --train: keep there what one rank has computed, and take it from there where another layout of the "
        "same is verified",
    )
    parser.add_argument(
        "--train",
        nargs=argparse.REMAINDER,
        metavar="FLAGS",
        help="verify a whole training; all that follows are the flags of finetune, --hf-model DIR and the layout first",
    )
    return parser


if __name__ == "__main__":
    from qtarget_megatron.megatron.faults import ending

    ending.run("verify", main, at_once={1})
