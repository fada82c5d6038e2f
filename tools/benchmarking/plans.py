"""What each part of the benchmark measures: shapes, number of processes and threads, and how long it may take."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tools.benchmarking import convert, figures, machine, packing, step, workers

Say = Callable[[str], None]
Rows = list[dict[str, Any]]

_DTYPES = ["float32", "bfloat16"]


def kernels(say: Say, quick: bool) -> Rows:
    """One process for each number of threads: torch.compile builds that number in."""
    arguments = dict(tokens=512, vocabularies=[32_000, 151_936], dtypes=_DTYPES, seconds=8.0, min_rounds=5)
    arguments["compiled"] = ["sft", "target-sft"]
    threads = sorted({1, min(2, machine.cores())})
    if quick:
        arguments |= dict(tokens=16, vocabularies=[2048], dtypes=["float32"], seconds=0.2, min_rounds=3)
        arguments["compiled"] = ["target-sft"]
        threads = [1]
    rows = []
    for number in threads:
        rows += workers.run(f"{_PACKAGE}.kernels:measure", arguments, say=say, threads=number, timeout=600)[0]
    return rows


def divergences(say: Say, quick: bool) -> Rows:
    """13 GiB: three matrices the size of the logits."""
    arguments = dict(tokens=14_000, vocabulary=152_000, dtype="bfloat16", top_k=64, chunk_size=512)
    arguments |= dict(seconds=60.0, min_rounds=3)
    threads = machine.cores()
    if quick:
        arguments |= dict(tokens=40, vocabulary=2048, dtype="float32", top_k=8, chunk_size=16, seconds=0.2)
        threads = 1
    return workers.run(f"{_PACKAGE}.divergences:measure", arguments, say=say, threads=threads, timeout=3600)[0]


def cuda(say: Say, quick: bool) -> Rows:
    arguments = dict(tokens=8192, vocabularies=[131_072], dtypes=["bfloat16"], seconds=10.0, min_rounds=20)
    arguments["compiled"] = ["sft", "target-sft"]
    if quick:
        arguments |= dict(tokens=512, vocabularies=[32_768], seconds=0.5, min_rounds=3)
    arguments["device"] = "cuda"
    return workers.run(f"{_PACKAGE}.kernels:measure", arguments, say=say, threads=machine.cores(), timeout=900)[0]


def cuda_head(say: Say, quick: bool) -> Rows:
    case = dict(tokens=8192, hidden=4096, vocabulary=131_072, chunk_sizes=[512, 1024, 2048, 4096])
    if quick:
        case = dict(tokens=512, hidden=256, vocabulary=32_768, chunk_sizes=[128, 256])
    case |= dict(dtype="bfloat16", supervised=[1.0], peers=True, device="cuda")
    arguments = dict(cases=[case], seconds=0.5 if quick else 10.0, min_rounds=3 if quick else 10)
    return workers.run(f"{_PACKAGE}.head:measure", arguments, say=say, threads=machine.cores(), timeout=900)[0]


def head(say: Say, quick: bool) -> Rows:
    # At most 4 GiB: the largest weight with its float32 gradient, and the logits as a whole.
    cases = [
        dict(tokens=1024, hidden=576, vocabulary=32_000, dtype="float32", chunk_sizes=[512, 256]),
        dict(tokens=1024, hidden=576, vocabulary=32_000, dtype="float32", teacher=True, supervised=[1.0]),
        dict(tokens=1024, hidden=576, vocabulary=151_936, dtype="bfloat16"),
        dict(tokens=1024, hidden=2048, vocabulary=32_000, dtype="bfloat16", supervised=[1.0]),
    ]
    arguments, threads = dict(cases=cases, seconds=4.0, min_rounds=3), machine.cores()
    if quick:
        small = dict(tokens=64, hidden=32, vocabulary=2048, chunk_sizes=[32, 16])
        arguments["cases"] = [small | dict(dtype="float32"), small | dict(dtype="bfloat16", teacher=True)]
        arguments["seconds"], threads = 0.2, 1
    return workers.run(f"{_PACKAGE}.head:measure", arguments, say=say, threads=threads, timeout=900)[0]


def collective(say: Say, quick: bool) -> Rows:
    arguments = dict(tokens=[512, 4096], rounds=200)
    sizes = [2, 4]
    if quick:
        arguments, sizes = dict(tokens=[64], rounds=10), [2]
    rows = []
    for ranks in sizes:
        by_rank = workers.run(f"{_PACKAGE}.collective:measure", arguments, say=say, ranks=ranks, timeout=300)
        for same in zip(*by_rank, strict=True):
            # A run is over when the last rank is.
            seconds = [max(values) for values in zip(*(row["seconds"] for row in same), strict=True)]
            rows.append(same[0] | {"ranks": ranks, "seconds": seconds, **figures.summary(seconds)})
    return rows


def training_step(say: Say, quick: bool) -> Rows:
    shape, variants, sizes = step.Shape(), list(step.VARIANTS), [1, 2]
    if quick:
        shape = step.Shape(vocabulary=512, hidden=64, layers=2, seq_length=64, global_batch=2, steps=4)
        variants, sizes = variants[-1:], [1]
    arguments = dict(shape=asdict(shape), variants=variants, tensor_parallel=sizes, timeout=180)
    return workers.run(f"{_PACKAGE}.step:measure", arguments, say=say, timeout=900)[0]


def adapters(say: Say, quick: bool) -> Rows:
    """All ways in one process, about 9 GiB of it: the weights 13 times, and a step."""
    shape, threads = replace(packing.SMOLLM2, seq_length=512), machine.cores()
    if quick:
        shape, threads = replace(packing.SMALL, seq_length=64), 1
    arguments = dict(shape=asdict(shape), rank=16)
    return workers.run(f"{_PACKAGE}.lora:measure", arguments, say=say, threads=threads, timeout=1800)[0]


def growth(say: Say, quick: bool) -> Rows:
    arguments = dict(
        tokens=[32, 64, 128, 256, 512, 1024],
        tokens_at=32_000,
        vocabularies=[8192, 16_384, 32_768, 65_536, 131_072, 262_144],
        vocabularies_at=128,
        shards=[1, 2, 4],
        shards_at=(256, 131_072),
        memory_tokens=[256, 512, 1024, 2048, 4096],
        memory_at=(256, 32_000),
        chunk_size=512,
        seconds=4.0,
    )
    if quick:
        arguments |= dict(tokens=[16, 32, 64], tokens_at=2048, vocabularies=[1024, 2048, 4096], vocabularies_at=16)
        arguments |= dict(shards_at=(16, 4096), memory_tokens=[64, 128], memory_at=(32, 1024), chunk_size=32)
        arguments["seconds"] = 0.1
    return workers.run(f"{_PACKAGE}.growth:measure", arguments, say=say, threads=1, timeout=300)[0]


def conversion(say: Say, quick: bool) -> Rows:
    shape, layouts, rounds = convert.Shape(), [(2, 1), (2, 2)], 3
    if quick:
        small = dict(vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
        shape, layouts, rounds = convert.Shape(**small, num_attention_heads=4, max_position_embeddings=64), [(2, 1)], 1
    rows = []
    with tempfile.TemporaryDirectory(prefix="qtarget-benchmark-") as folder:
        convert.check_disk(Path(folder), shape)
        workers.run(
            f"{_PACKAGE}.convert:write", dict(folder=folder, shape=asdict(shape)), say=say, threads=1, timeout=600
        )
        for tp, pp in layouts:
            arguments = dict(folder=folder, tensor_parallel=tp, pipeline_parallel=pp, rounds=rounds)
            threads = max(machine.cores() // (tp * pp), 1)
            by_rank = workers.run(
                f"{_PACKAGE}.convert:measure", arguments, say=say, ranks=tp * pp, threads=threads, timeout=900
            )
            for same in zip(*by_rank, strict=True):
                # A run is over when the last rank is.
                seconds = [max(values) for values in zip(*(row["seconds"] for row in same), strict=True)]
                per_rank = {key: [row[key] for row in same] for key in ("resident_bytes", "shard_bytes")}
                rows.append(same[0] | per_rank | {"threads": threads, "seconds": seconds, **figures.summary(seconds)})
    return rows


def data(say: Say, quick: bool) -> Rows:
    lengths, shapes = [512, 2048, 8192], [packing.Shape(), packing.SMOLLM2]
    if quick:
        lengths, shapes = [64, 128], [packing.SMALL]
    arguments = dict(tokens=lengths, heads=4, width=64, seconds=0.2 if quick else 4.0, min_rounds=3)
    attention = workers.run(f"{_PACKAGE}.packing:measure_attention", arguments, say=say, threads=1, timeout=600)[0]
    arguments = dict(samples=2000 if quick else 100_000, row_length=2048, ranks=[2, 8, 64])
    planned = workers.run(f"{_PACKAGE}.packing:measure_balance", arguments, say=say, timeout=600)[0]
    planned += inspection(say, records=2000 if quick else 1_000_000)
    arguments = dict(shapes=[asdict(shape) for shape in shapes], timeout=900)
    return (
        attention + planned + workers.run(f"{_PACKAGE}.packing:measure_training", arguments, say=say, timeout=1800)[0]
    )


def inspection(say: Say, records: int) -> Rows:
    """Two starts of two ranks on the same records: of the rows the first rank's."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="qtarget-benchmark-") as folder:
        before = os.environ.get("QTARGET_CACHE_DIR")
        os.environ["QTARGET_CACHE_DIR"] = folder
        try:
            workers.run(f"{_PACKAGE}.packing:prepare_records", dict(folder=folder, count=records), say=say, timeout=900)
            for start in ("first start", "second start"):
                arguments = dict(folder=folder, start=start)
                rows += workers.run(
                    f"{_PACKAGE}.packing:measure_inspection", arguments, say=say, ranks=2, timeout=3600
                )[:1]
        finally:
            if before is None:
                del os.environ["QTARGET_CACHE_DIR"]
            else:
                os.environ["QTARGET_CACHE_DIR"] = before
    return rows


_PACKAGE = __name__.rpartition(".")[0]

# In the order of the report.
PLANS: dict[str, Callable[[Say, bool], Rows]] = {
    "kernels": kernels,
    "divergences": divergences,
    "head": head,
    "collective": collective,
    "step": training_step,
    "lora": adapters,
    "data": data,
    "growth": growth,
    "convert": conversion,
    "cuda": cuda,
    "cuda-head": cuda_head,
}
