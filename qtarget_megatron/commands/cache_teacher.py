"""Run a teacher over a data set once and keep its most likely tokens, for training without the teacher.

    # the 64 most likely tokens at every supervised token
    qtarget cache-teacher --teacher-hf DIR --data train.jsonl --out CACHE \\
        --k 64 --seq-length 4096

    # fewer where these hold 99% of the mass
    qtarget cache-teacher --teacher-hf DIR --data train.jsonl --out CACHE \\
        --k 64 --top-p 0.99 --seq-length 4096

    # a teacher too large for one process, weights from a Megatron checkpoint
    torchrun --nproc-per-node 8 -m qtarget_megatron.cache_teacher --teacher-hf DIR --load CKPT \\
        --data train.jsonl --out CACHE --k 64 --seq-length 4096 --micro-batch-size 4 --bf16 \\
        --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2

For each supervised token the cache holds the ids of the k most likely tokens, their log-probabilities in nats, and the
mass of all others (the tail). It is read by sample: whatever the seed, the order, the micro-batches and the layout of
the training. It serves trainings on the same data with the same tokenizer and chat template, and at most this
--seq-length; anything else is noticed and refused. Where teacher and student share the vocabulary, but not the chat
template or the size that the vocabulary is padded to, say --student-hf.

Bytes per token (--dtype float32: 2 k - 4 more; --top-p: fewer entries, and 2 more for their number):

    vocabulary           k      k = 8    32    64   128
    up to 65536      4 k + 12      44   140   268   524
    above            5 k + 12      52   172   332   652

float16 rounds log p - max log p by at most 2^-11 of itself: by 0.4% for a token at a thousandth of the largest one.

A run that was ended goes on where it stopped, up to 512 samples earlier, when it is started again with the same inputs,
at any layout. Every Megatron flag works; the teacher computes in float32 unless --bf16 or --fp16 is given, which round
its logits too.
"""

from __future__ import annotations

import argparse

from qtarget_megatron.commands.parsers import MEGATRON, add_path, add_run, command_parser, run_options


def main(argv: list[str] | None = None) -> int:
    """Write one cache; returns the process's exit code: 0 done, 2 bad input."""
    from qtarget_megatron.megatron.faults.ending import exit_code

    return exit_code("cache-teacher", lambda: _run(*command_line().parse_known_args(argv)))


def _run(ours: argparse.Namespace, words: list[str]) -> int:
    from qtarget_megatron.megatron.jobs.cache_teacher import CacheOptions, cache_teacher
    from qtarget_megatron.megatron.runtime.ranks import print_once
    from qtarget_megatron.teacher_cache import TeacherCache

    options = CacheOptions(
        **run_options(ours, ours.teacher_hf),
        k=ours.k,
        top_p=ours.top_p,
        dtype=ours.dtype,
        student=ours.student_hf,
    )
    cache_teacher(options, words, cpu=ours.cpu)
    cache = TeacherCache(ours.out)
    mean = cache.num_entries / max(cache.num_tokens, 1)
    print_once(
        f"cache-teacher: {ours.out}: {len(cache)} samples, {cache.num_tokens} supervised tokens, "
        f"{mean:.1f} entries each, {cache.num_bytes / 1e6:,.1f} MB; mean tail {cache.mean_tail:.4f}"
    )
    return 0


def command_line() -> argparse.ArgumentParser:
    """The parser of its own flags."""
    parser = command_parser("cache-teacher", __doc__, others=MEGATRON)
    add_run(
        parser,
        model="--teacher-hf",
        what="the teacher",
        out=("CACHE", "directory to write, new or empty, or with a cache that is not complete"),
        seq_length="; training may cut shorter",
    )
    parser.add_argument("--k", type=int, required=True, metavar="K", help="most likely tokens to keep")
    parser.add_argument("--top-p", type=float, metavar="P", help="keep the fewest of them whose mass reaches P")
    parser.add_argument(
        "--dtype", default="float16", metavar="T", help="of the log-probabilities: float16 (default) or float32"
    )
    add_path(
        parser,
        "--student-hf",
        "DIR",
        "the student: its tokenizer, chat template and vocabulary size (default: the teacher's)",
    )
    return parser


if __name__ == "__main__":
    from qtarget_megatron.megatron.faults import ending

    ending.run("cache-teacher", main)
