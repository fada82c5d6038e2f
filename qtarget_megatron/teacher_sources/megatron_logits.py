"""What Megatron-LM's --logits-save-dir has written, as a teacher.

    [cpC_]dpD__I.tar    of data-parallel rank D, up to iteration I
        _meta.json      what the teacher's training was
        N.pt.zst        iteration N: values float [s, b, k], indices_low uint16, bit_17 bool, each a list with a tensor
                        for each micro-batch, or one tensor of all of them (format_version 2)

Row r of rank D of an iteration is its sample ((r // m) ranks + D) m + r mod m, with m samples in a micro-batch: the
order of MegatronPretrainingSampler. Position p of a row predicts token p + 1. Files hold neither tokens nor records:
which record of the data each sample was has to be known. Tensors are read with weights_only.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtarget_megatron.data import EncodedSample
from qtarget_megatron.teacher_cache import SampleEntries
from qtarget_megatron.teacher_sources.source import entries_of, predicted_from

_TAR = re.compile(r"(?:cp(?P<cp>\d+)_)?dp(?P<dp>\d+)__(?P<last>\d+)\.tar")
_MEMBER = re.compile(r"(?P<iteration>\d+)\.pt\.zst")
# Entries that top-p left out have a log-probability below it.
_LEFT_OUT = -900.0
# Iterations that are kept decoded: a sample's neighbours are in the same one.
_KEPT = 4


class MegatronLogits:
    """A folder of tars.

    order: record of each sample in the order in which the teacher's training took them; default record n is sample n.

    ValueError for a folder without tars or with gaps among their ranks, tars of several context-parallel ranks, files
    that are damaged, and without pyarrow, which reads zstd.
    """

    parallel, repeats = 1, False

    def __init__(self, directory: Path, order: Sequence[int] | None = None):
        self._directory = directory
        tars: dict[int, list[Path]] = {}
        for path in sorted(directory.glob("*.tar")):
            if (match := _TAR.fullmatch(path.name)) is None:
                continue
            if int(match["cp"] or 0):
                raise ValueError(
                    f"{path}: of a context-parallel rank, whose rows are parts of sequences: save the teacher's "
                    "log-probabilities without context parallelism, or with a Megatron-LM that writes whole sequences"
                )
            tars.setdefault(int(match["dp"]), []).append(path)
        if not tars or sorted(tars) != list(range(len(tars))):
            raise ValueError(
                f"{directory}: expected tars of --logits-save-dir, dp0__N.tar and so on for each data-parallel rank, "
                f"got {sorted(tars) or 'none'}"
            )
        self._ranks = len(tars)
        self._places: dict[tuple[int, int], tuple[Path, int, int]] = {}
        meta: dict[str, Any] | None = None
        for rank, paths in tars.items():
            for path in paths:
                meta = self._index(rank, path, meta)
        saver = (meta or {}).get("saver", {})
        self._meta = meta or {}
        self._iterations = sorted({iteration for _, iteration in self._places})
        self.k, p = int(saver.get("k", 0)), saver.get("p")
        self.top_p = float(p) if p is not None and float(p) < 1 else None
        self.precision = str(saver.get("save_dtype", "fp16"))
        self.name = f"Megatron-LM logits of {directory.resolve().name}"
        described = [self._meta, sorted((path.name, path.stat().st_size) for paths in tars.values() for path in paths)]
        self.made_from = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self._decoded: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray, int]] = OrderedDict()
        if self.k < 1:
            raise ValueError(f"{directory}: _meta.json does not say how many entries were saved")
        self._sample_of = None if order is None else {record: sample for sample, record in enumerate(order)}

    def _index(self, rank: int, path: Path, meta: dict[str, Any] | None) -> dict[str, Any]:
        """Where the members of a tar lie; its metadata, which must be those of the others."""
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.name == "_meta.json" and member.isreg():
                        file = tar.extractfile(member)
                        assert file is not None
                        own = json.loads(file.read())
                        if meta is not None and own != meta:
                            raise ValueError(f"{path} is of another run than the tars beside it: keep each in a folder")
                        meta = own
                    elif (match := _MEMBER.fullmatch(member.name)) and member.isreg():
                        self._places[rank, int(match["iteration"])] = (path, member.offset_data, member.size)
        except (tarfile.TarError, OSError, json.JSONDecodeError, AssertionError) as error:
            raise ValueError(f"{path} is no tar of saved log-probabilities, or damaged") from error
        if not isinstance(meta, dict):
            raise ValueError(f"{path} has no _meta.json: expected a tar of --logits-save-dir")
        return meta

    def entries(self, index: int, sample: EncodedSample) -> SampleEntries:
        place = index if self._sample_of is None else self._sample_of.get(index)
        if place is None:
            raise ValueError(f"record {index} is not among those of --order, which the teacher's training took")
        values, indices = self._row(place, index)
        rows = predicted_from(sample)
        if len(rows) and rows[-1] >= len(values):
            raise ValueError(
                f"record {index} has {rows[-1] + 2} tokens, the saved sequences {len(values)}: give a smaller "
                "--seq-length"
            )
        log_p, ids = values[rows].astype(np.float64), indices[rows]
        log_p[log_p < _LEFT_OUT] = -np.inf
        if missing := self.k - log_p.shape[1]:
            log_p = np.pad(log_p, ((0, 0), (0, missing)), constant_values=-np.inf)
            ids = np.pad(ids, ((0, 0), (0, missing)))
        return entries_of(index, sample, ids, log_p)

    def _row(self, place: int, record: int) -> tuple[np.ndarray, np.ndarray]:
        """values [s, k] and ids [s, k] of the sample that came so many samples after the first one."""
        first, indices, micro = self._iteration(self._iterations[0], 0)
        size = first.shape[1] * self._ranks  # samples of an iteration
        number, within = divmod(place, size)
        if number >= len(self._iterations):
            raise ValueError(
                f"record {record} is sample {place} of the teacher's training, of which {len(self._iterations)} "
                f"iterations of {size} samples were saved: give --order, or train the teacher longer"
            )
        block, offset = divmod(within, micro)
        rank, row = block % self._ranks, block // self._ranks * micro + offset
        values, indices, _ = self._iteration(self._iterations[number], rank)
        return values[:, row], indices[:, row]

    def _iteration(self, iteration: int, rank: int) -> tuple[np.ndarray, np.ndarray, int]:
        """values and ids [s, b, k] of an iteration of a rank, and the samples of a micro-batch."""
        key = (rank, iteration)
        if key not in self._decoded:
            if key not in self._places:
                raise ValueError(f"{self._directory}: iteration {iteration} of rank {rank} is missing")
            path, offset, size = self._places[key]
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
            try:
                read = torch.load(io.BytesIO(_decompressed(data)), weights_only=True, map_location="cpu")
                micro, values, low, high = self._parts(read)
            except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError) as error:
                raise ValueError(f"{path}: iteration {iteration} is damaged, or of another format: {error}") from error
            self._decoded[key] = values.float().numpy(), (low.long() | high.long() << 16).numpy(), micro
            if len(self._decoded) > _KEPT * self._ranks:
                self._decoded.popitem(last=False)
        return self._decoded[key]

    def _parts(self, read: dict[str, Any]) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples of a micro-batch, and the three tensors [s, b, k]."""
        names = ("values", "indices_low", "bit_17")
        if read.get("format_version", 1) >= 2:
            saved = self._meta | self._meta.get("saver", {})
            values, low, high = (read[name] for name in names)
            return int(saved["mbs_save"]), values, low, high
        lists = [read[name] for name in names]
        widest = max(part.shape[2] for part in lists[0])
        # Micro-batches whose nuclei are smaller have fewer entries.
        fill = {"values": 2 * _LEFT_OUT, "indices_low": 0, "bit_17": False}
        values, low, high = (
            torch.cat([_padded(part, widest, fill[name]) for part in parts], dim=1)
            for name, parts in zip(names, lists, strict=True)
        )
        return lists[0][0].shape[1], values, low, high


def _padded(part: torch.Tensor, width: int, value: float) -> torch.Tensor:
    found = part.new_full((*part.shape[:2], width), value) if part.dtype != torch.uint16 else None
    if found is None:
        found = torch.zeros(*part.shape[:2], width, dtype=torch.int32)
    found[..., : part.shape[2]] = part.to(found.dtype)
    return found


def _decompressed(data: bytes) -> bytes:
    try:
        import pyarrow
    except ImportError:
        raise ValueError("zstd is read by pyarrow: pip install 'qtarget_megatron[data]'") from None
    with pyarrow.input_stream(io.BytesIO(data), compression="zstd") as stream:
        return bytes(stream.read())
