"""Conversion of a random model of a real shape, in both directions, ranks as processes of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.benchmarking.workers import MeasurementFailed

# Times the bytes of the model: itself, the checkpoint, the export, and some room.
_COPIES = 3.2
WAYS = ("read", "import", "export")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 model with tied embeddings; the defaults are those of Qwen2.5-1.5B."""

    vocab_size: int = 151_936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    max_position_embeddings: int = 32_768

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in bfloat16, about."""
        head = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * (self.hidden_size + self.num_key_value_heads * head)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return 2 * (self.vocab_size * self.hidden_size + self.num_hidden_layers * layer)


def check_disk(folder: Path, shape: Shape) -> None:
    """Raise MeasurementFailed where the folder's disk is too small."""
    needed, free = _COPIES * shape.nbytes, shutil.disk_usage(folder).free
    if free < needed:
        raise MeasurementFailed(
            f"{folder} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are needed: make room, or set TMPDIR"
        )


def write(*, say: Callable[[str], None], folder: str, shape: dict[str, Any]) -> None:
    """model, in bfloat16 and files of 1 GB, and small, to warm up with."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    small = Shape(256, 64, 128, 4, 4, 2, 64)
    for name, of in (("small", small), ("model", Shape(**shape))):
        config = transformers.Qwen2Config(**asdict(of), tie_word_embeddings=True, dtype="bfloat16")
        torch.manual_seed(6)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(Path(folder, name), max_shard_size="1GB")
        say(f"wrote a random model of {sum(p.nbytes for p in model.parameters()) / 1e9:.2f} GB")


def measure(
    *, say: Callable[[str], None], folder: str, tensor_parallel: int, pipeline_parallel: int, rounds: int
) -> list[dict[str, Any]]:
    """One row for each way, on each rank: seconds of each round, the largest growth of resident memory, and the bytes
    of this rank's part of the model (shard) and of all parts.

    read: the Hugging Face files into a model. import: that, and Megatron's checkpoint written. export: the checkpoint
    read into a model, and the Hugging Face files written. Files are as warm as the page cache keeps them; what is
    written is on the disk at the end.
    """
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    from qtarget_megatron.megatron.runtime import cpu_platform
    from tools.benchmarking.measure import resident

    cpu_platform.activate()
    from megatron.training.training import destroy_global_state

    from qtarget_megatron.megatron.jobs.convert import export_hf, import_hf
    from qtarget_megatron.megatron.jobs.open_model import open_model

    words = ["--tensor-model-parallel-size", str(tensor_parallel)]
    words += ["--pipeline-model-parallel-size", str(pipeline_parallel)]
    shard = 0

    def read(name: str) -> None:
        nonlocal shard
        model = open_model(Path(folder, name), words, dtype=torch.bfloat16)
        shard = sum(parameter.nbytes for chunk in model.chunks for parameter in chunk.parameters())

    runs = {
        "read": read,
        "import": lambda name: import_hf(Path(folder, name), Path(folder, "checkpoint"), words),
        "export": lambda name: export_hf(
            Path(folder, name), Path(folder, "checkpoint"), Path(folder, "exported"), words
        ),
    }
    found: dict[str, list[tuple[float, int | None]]] = {way: [] for way in WAYS}
    for name in ["small", *["model"] * rounds]:
        for way in WAYS:
            dist.barrier()
            seconds, grown = resident(lambda way=way, name=name: runs[way](name))
            # Megatron's global state, not the groups: a few remain, and are closed with the process.
            destroy_global_state()
            if name == "model":
                found[way].append((seconds, grown))
                say(f"{way}, TP {tensor_parallel} x PP {pipeline_parallel}: {seconds:.1f} s")
        dist.barrier()
        if dist.get_rank() == 0:
            for written in ("checkpoint", "exported"):
                shutil.rmtree(Path(folder, written))
    shards = torch.tensor(shard)
    dist.all_reduce(shards)
    return [
        {
            "way": way,
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
            "seconds": [seconds for seconds, _ in found[way]],
            "resident_bytes": None if None in (grown := [bytes_ for _, bytes_ in found[way]]) else max(grown),
            "shard_bytes": shard,
            "model_bytes": shards.item(),
        }
        for way in WAYS
    ]
