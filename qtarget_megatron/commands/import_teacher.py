"""Make a teacher cache of what another program says or has written, for training without the teacher.

    # a server of vLLM (started with --max-logprobs 20 or more), or of SGLang
    qtarget import-teacher vllm --url http://HOST:8000 --k 20 --hf-model STUDENT_DIR --data train.jsonl \\
        --out CACHE --seq-length 4096
    qtarget import-teacher sglang --url http://HOST:30000 --k 32 --hf-model STUDENT_DIR --data train.jsonl \\
        --out CACHE --seq-length 4096

    # DistillKit's rows, found by their tokens; its compression_config.yaml lies beside them
    qtarget import-teacher distillkit --rows DIR --hf-model STUDENT_DIR --data train.jsonl --out CACHE --seq-length 4096

    # what Megatron-LM's --logits-save-dir has written; ORDER: the record of each sample that was trained on
    qtarget import-teacher megatron --logits DIR --order ORDER --hf-model STUDENT_DIR --data train.jsonl \\
        --out CACHE --seq-length 4096

    # several caches of the same data as one teacher
    qtarget import-teacher caches --cache A B --weights 2 1 --hf-model STUDENT_DIR --data train.jsonl \\
        --out CACHE --seq-length 4096

The cache is one of qtarget cache-teacher's, and serves a training (--teacher-cache) as those do. A run that was ended
goes on where it stopped, up to 512 samples earlier. Samples from the whole file are checked before the cache is
complete: how often a place's token is among the kept entries, more often than its neighbours; a server is asked for
them again, and must say the same.

Teacher and student must share the tokens' ids. Of a server only the prompt's log-probabilities are asked for, at the
token ids of --hf-model's tokenizer and chat template. Megatron's files hold neither tokens nor records: ORDER is a
file with the number of a record in each line, sample by sample (default: 0, 1, 2, ...), each of which began a row.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qtarget_megatron.commands.parsers import add_path, command_parser
from qtarget_megatron.data.forms import add_data_format

if TYPE_CHECKING:
    from qtarget_megatron.teacher_sources import TeacherSource

# The flags of each kind of source, of which the first must be given.
_FLAGS = {
    "vllm": ("url", "k", "model", "api_key_variable", "parallel", "timeout"),
    "sglang": ("url", "k", "api_key_variable", "parallel", "timeout"),
    "distillkit": ("rows", "config"),
    "megatron": ("logits", "order"),
    "caches": ("cache", "weights", "tail", "k"),
}


def main(argv: list[str] | None = None) -> int:
    """Write one cache; returns the process's exit code: 0 done, 2 bad input."""
    from qtarget_megatron.megatron.faults.ending import exit_code

    return exit_code("import-teacher", lambda: _run(command_line().parse_args(argv)))


def _run(ours: argparse.Namespace) -> int:
    from qtarget_megatron.megatron.jobs.import_teacher import ImportOptions, import_teacher
    from qtarget_megatron.teacher_cache import TeacherCache

    open_source = _source(ours)
    names = ("hf_model", "data", "out", "seq_length", "data_format", "data_date", "dtype", "checks")
    source = import_teacher(ImportOptions(**{name: getattr(ours, name) for name in names}), open_source)
    cache = TeacherCache(ours.out)
    mean = cache.num_entries / max(cache.num_tokens, 1)
    print(
        f"import-teacher: {ours.out}: {source.name}: {len(cache)} samples, {cache.num_tokens} supervised tokens, "
        f"{mean:.1f} entries each, {cache.num_bytes / 1e6:,.1f} MB; mean tail {cache.mean_tail:.4f}"
    )
    return 0


def _source(ours: argparse.Namespace) -> Callable[[], TeacherSource]:
    """What opens the source that the flags name. ValueError for flags of another kind, or none of it."""
    given = {name for names in _FLAGS.values() for name in names if getattr(ours, name) is not None}
    own = _FLAGS[ours.source]
    if stray := sorted(given - set(own)):
        raise ValueError(f"--{stray[0].replace('_', '-')} is not of {ours.source}: drop it")
    needed = own[:2] if ours.source in ("vllm", "sglang") else own[:1]
    for name in needed:
        if getattr(ours, name) is None:
            raise ValueError(f"{ours.source}: --{name} is missing, see --help")
    from qtarget_megatron import teacher_sources

    if ours.source == "caches":
        tail = ours.tail or "uniform"
        return lambda: teacher_sources.Ensemble(ours.cache, ours.weights, k=ours.k, tail=tail)
    if ours.source == "distillkit":
        return lambda: teacher_sources.DistillKitRows(ours.rows, ours.config)
    if ours.source == "megatron":
        order = None if ours.order is None else _order(ours.order)
        return lambda: teacher_sources.MegatronLogits(ours.logits, order)
    key = None
    if ours.api_key_variable is not None and (key := os.environ.get(ours.api_key_variable)) is None:
        raise ValueError(f"--api-key-variable: the environment has no {ours.api_key_variable}")
    options = {name: getattr(ours, name) for name in ("parallel", "timeout") if getattr(ours, name) is not None}
    if options.get("parallel", 1) < 1 or ours.k < 1:
        raise ValueError("--parallel and --k: expected 1 or more")
    return lambda: teacher_sources.Endpoint(ours.url, ours.source, ours.k, ours.model, key, **options)


def _order(path: Path) -> list[int]:
    """Record numbers, one in a line. ValueError for anything else, and for one that comes twice."""
    try:
        order = [int(line) for line in path.read_text().split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--order {path}: expected the number of a record in each line: {error}") from error
    if min(order, default=0) < 0 or len(set(order)) < len(order):
        raise ValueError(f"--order {path}: expected numbers from 0 on, each once")
    return order


def command_line() -> argparse.ArgumentParser:
    """The parser of its flags."""
    parser = command_parser("import-teacher", __doc__)
    parser.add_argument("source", choices=sorted(_FLAGS), help="where the teacher's word comes from")
    add_path(
        parser, "--hf-model", "DIR", "the student: its tokenizer, chat template and vocabulary size", required=True
    )
    add_path(parser, "--data", "FILE", "the data, a file or folder as for training", required=True)
    add_data_format(parser)
    parser.add_argument("--data-date", metavar="YYYY-MM-DD", help="the date that a chat template writes")
    add_path(parser, "--out", "CACHE", "directory to write, new or empty, or with a cache that is begun", required=True)
    parser.add_argument(
        "--seq-length", type=int, required=True, metavar="S", help="samples are cut to it; training may cut shorter"
    )
    parser.add_argument(
        "--k", type=int, metavar="K", help="most likely tokens to ask for, or to keep of several caches"
    )
    parser.add_argument(
        "--dtype", default="float16", metavar="T", help="of the log-probabilities: float16 (default) or float32"
    )
    parser.add_argument("--checks", type=int, default=8, metavar="N", help="samples to check in the end (default: 8)")
    server = parser.add_argument_group("vllm, sglang")
    server.add_argument("--url", metavar="URL", help="http://HOST:PORT of the server")
    server.add_argument("--model", metavar="NAME", help="of its models (default: the first that it serves)")
    server.add_argument("--api-key-variable", metavar="NAME", help="the environment variable with its key")
    server.add_argument("--parallel", type=int, metavar="N", help="samples to ask for at a time (default: 8)")
    server.add_argument("--timeout", type=float, metavar="S", help="seconds that an answer may take (default: 300)")
    files = parser.add_argument_group("distillkit, megatron, caches")
    files.add_argument("--rows", type=Path, metavar="PATH", help="a parquet file, or a folder of them")
    files.add_argument("--config", type=Path, metavar="FILE", help="its compression config, where it lies elsewhere")
    files.add_argument("--logits", type=Path, metavar="DIR", help="the teacher's --logits-save-dir")
    files.add_argument("--order", type=Path, metavar="FILE", help="records in the order in which they were trained on")
    files.add_argument("--cache", type=Path, nargs="+", metavar="DIR", help="two caches of the same data, or more")
    files.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the caches (default: all the same)")
    files.add_argument(
        "--tail", metavar="RULE", help="what a cache says of a token that it does not keep: uniform (default) or drop"
    )
    return parser


if __name__ == "__main__":
    from qtarget_megatron.megatron.faults import ending

    ending.run("import-teacher", main)
