"""Whether a training resumes from the state that it was saved with.

A fingerprint has the number of elements and the sum of bits (see bit_sums) of each parameter of the whole model, of its
master weights and of its moments. It is exact and the same at any layout, so nothing needs a tolerance. Rows of the
vocabulary that are padding do not count: each tensor-parallel size has its own. Whatever reads only the weights of a
checkpoint compares those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from qtarget_megatron.huggingface import Architecture, hf_names, is_expert, partition_dim
from qtarget_megatron.megatron.faults.resume_point import newest_complete
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.megatron.weights.bit_sums import INTEGERS, bit_sum, wrapped
from qtarget_megatron.megatron.weights.hf_weights import first_indices, saved, tensor_share, weights

_log = logging.getLogger("qtarget_megatron")
ATTRIBUTE = "qtarget_fingerprint"
_WEIGHTS, MASTER, _ROUNDED = "weights", "master weights", "rounded master weights"
_PARTS = (_WEIGHTS, MASTER, "exp_avg", "exp_avg_sq", "momentum_buffer", _ROUNDED)
# What float32 holds exactly.
_NARROWER = ("torch.bfloat16", "torch.float16")
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class _Piece:
    """Some consecutive elements of a parameter's part that this rank has.

    start: place of the first one in the rank's whole parameter. counts: whether this is the one copy of them that the
    fingerprint of the model counts.
    """

    name: str
    part: str
    values: Tensor
    start: int
    counts: bool


class Fingerprints:
    """Makes the fingerprint that a checkpoint is saved with, and compares that of a loaded one.

    Both read every element once; they communicate the parameters' names at first, and one all-reduce of four integers
    for each part of each parameter of the whole model.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        arch: Architecture,
        named: Callable[[LanguageModule, Architecture], Iterable[tuple[str, Tensor]]] = saved,
    ):
        """named: the parameters of a chunk that are taken, default what checkpoints have of it."""
        self._args, self._arch, self._named = args, arch, named
        self._rows: dict[str, int] | None = None

    def record(self, chunks: Sequence[LanguageModule], optimizer) -> None:
        """Put the fingerprint into args, which Megatron saves with every checkpoint. Collective over all ranks.

        chunks: of this rank, without wrappers. optimizer: Megatron's, or None.
        """
        args = self._args
        optimizer = None if args.no_save_optim else optimizer
        pieces = (piece for piece in self._pieces(chunks, optimizer) if piece.counts)
        table = self._sums(chunks, pieces)
        found: dict[str, dict[str, list[int]]] = {}
        for name, row in self._rows.items():
            of_parts = zip(_PARTS, table[row].tolist(), strict=True)
            found[name] = {part: numbers[:2] for part, numbers in of_parts if numbers[0] > 0}
        setattr(args, ATTRIBUTE, {"dtype": str(args.params_dtype), "step": _step(optimizer), "parameters": found})

    def compare(self, chunks: Sequence[LanguageModule], optimizer, directory: str) -> None:
        """ValueError on every rank where the loaded state is not what was saved in the directory of an iteration.

        Collective over all ranks. Where the checkpoint has no fingerprint, as those of earlier versions, copies of one
        thing are compared with each other: data-parallel replicas, and the master weights with the model's.
        """
        saved, saved_optimizer = on_first_rank(lambda: saved_fingerprint(directory))
        if not saved_optimizer:
            optimizer = None
        pieces = self._pieces(chunks, optimizer, rounded=saved is None)
        table = self._sums(chunks, pieces).tolist()
        rows = {name: dict(zip(_PARTS, table[row], strict=True)) for name, row in self._rows.items()}
        if saved is None:
            self._compare_copies(rows, directory)
            _log.info(
                "%s has no fingerprint of its state: its copies were compared with each other, nothing with what was "
                "saved",
                directory,
            )
            return
        parts = [part for part in _PARTS if part != _WEIGHTS or saved["dtype"] == str(self._args.params_dtype)]
        compared = _compare_sums(rows, saved, parts, directory)
        step, expected = _step(optimizer), saved["step"]
        if step != expected and None not in (step, expected):
            raise ValueError(f"{directory}: the optimizer has made {step} steps, {expected} when it was saved")
        _log.info("the state that was loaded is what was saved, bit for bit (%d tensors)", compared)

    def compare_weights(
        self, chunks: Sequence[LanguageModule], saved: dict | None, directory: str, *, step_flag: str = "--ckpt-step"
    ) -> None:
        """ValueError on every rank where weights that were loaded alone are not what was saved in the directory.

        Collective over all ranks.

        saved:     the fingerprint there, or None. Weights that were saved in bfloat16 or float16 are compared in
                   float32 too, which takes a copy of one parameter at a time; rows of a vocabulary that is cut are not.
                   Where nothing can be compared a line says so.
        step_flag: chooses another iteration.
        """
        ours = str(self._args.params_dtype)
        reason = None
        if saved is None:
            reason = "has no fingerprint"
        elif not _holds_exactly(ours, saved["dtype"]):
            reason = f"was saved in {saved['dtype']} and is loaded in {ours}".replace("torch.", "")
        if reason is not None:
            _log.info("%s %s: its weights were not compared with what was saved", directory, reason)
            return
        dtype = getattr(torch, saved["dtype"].removeprefix("torch."))
        table = self._sums(chunks, self._pieces(chunks, None, dtype=dtype)).tolist()
        rows = {name: dict(zip(_PARTS, table[row], strict=True)) for name, row in self._rows.items()}
        if any(chunk.vocab_size < self._arch.vocab_size for chunk in chunks):
            rows = {name: parts for name, parts in rows.items() if name not in (_EMBEDDING, _HEAD)}
        compared = _compare_sums(rows, saved, [_WEIGHTS], directory, step_flag)
        _log.info("the weights of %s are what was saved, bit for bit (%d tensors)", directory, compared)

    def _compare_copies(self, rows: dict, directory: str) -> None:
        """ValueError where copies of one thing in a loaded state differ."""
        for name, parts in rows.items():
            for part, (count, total, all_count, all_total) in parts.items():
                if count and (all_count % count or wrapped(all_count // count * total) != all_total):
                    raise ValueError(
                        f"{directory}: {part} of {name} differ between ranks that hold the same; {_OLD_STATE}"
                    )
            if parts[_ROUNDED][0] == parts[_WEIGHTS][0] and parts[_ROUNDED][1] != parts[_WEIGHTS][1]:
                raise ValueError(
                    f"{directory}: the optimizer's {MASTER} of {name} are not the model's weights; {_OLD_STATE}"
                )

    # ---- what this rank has

    def _pieces(
        self, chunks: Sequence[LanguageModule], optimizer, *, rounded: bool = False, dtype: torch.dtype | None = None
    ) -> Iterator[_Piece]:
        """All parts of all parameters of this rank.

        rounded: also the master weights in the model's dtype.
        dtype:   that the weights are taken in, where it is not the model's.
        """
        names: dict[int, tuple[str, bool]] = {}
        for chunk in chunks:
            tied = chunk.share_embeddings_and_output_weights
            for name, parameter in self._named(chunk, self._arch):
                is_copy = tied and name == _HEAD
                names[id(parameter)] = self._key(chunk, name), self._is_first_shard(chunk, name, parameter)
                if type(parameter) in (Tensor, torch.nn.Parameter):
                    counts = names[id(parameter)][1] and _replica(name) == 0
                    # The router's numbers that are no parameters are float32 in any model.
                    as_saved = dtype if isinstance(parameter, torch.nn.Parameter) else None
                    values = parameter.detach().to(as_saved or parameter.dtype)
                    values = self._known_rows(chunk, name, values.reshape(-1), 0, parameter.shape)
                    yield _Piece(names[id(parameter)][0], _WEIGHTS, values, 0, counts and not is_copy)
                if is_copy:
                    # Its moments are a second copy that not every format of checkpoints restores from the first.
                    del names[id(parameter)]
        chunk_of = {
            id(parameter): (chunk, name) for chunk in chunks for name, parameter in self._named(chunk, self._arch)
        }
        for parameter, start, tensors, replica in optimizer_states(optimizer):
            if id(parameter) not in names:
                continue
            (key, first_shard), (chunk, name) = names[id(parameter)], chunk_of[id(parameter)]
            replica = _replica(name) if replica is None else replica
            if rounded and MASTER in tensors and parameter.dtype != torch.float32:
                tensors = tensors | {_ROUNDED: tensors[MASTER].to(parameter.dtype)}
            for part, values in tensors.items():
                if part in _PARTS and values.element_size() in INTEGERS:
                    values = self._known_rows(chunk, name, values.detach().reshape(-1), start, parameter.shape)
                    yield _Piece(key, part, values, start, first_shard and replica == 0)

    def _key(self, chunk: LanguageModule, name: str) -> str:
        """The parameter's name in the whole model."""
        if chunk.share_embeddings_and_output_weights and name == _HEAD:
            return _EMBEDDING
        first = first_indices(chunk, self._arch)
        name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda found: str(int(found[0]) + first["layer_offset"]), name)
        grouped = r"(?<=\.experts\.linear_fc[12]\."
        number = rf"(?<=\.local_experts\.)\d+|{grouped}weight)\d+$|{grouped}bias)\d+$|{grouped}lora\.[AB])\d+$"
        return re.sub(number, lambda found: str(int(found[0]) + first["expert_offset"]), name)

    def _is_first_shard(self, chunk: LanguageModule, name: str, parameter: Tensor) -> bool:
        """Whether the rank counts among those that tensor parallelism cuts the parameter over: each, or the first."""
        _, size = tensor_share(chunk, self._arch, name, parameter)
        group = chunk.pg_collection.expt_tp if is_expert(name) else chunk.pg_collection.tp
        return size > 1 or group.rank() == 0

    def _known_rows(self, chunk: LanguageModule, name: str, flat: Tensor, start: int, shape: torch.Size) -> Tensor:
        """Elements from start on, without those of padded rows of the vocabulary."""
        if name not in (_EMBEDDING, _HEAD):
            return flat
        known = max(self._arch.vocab_size - chunk.pg_collection.tp.rank() * shape[0], 0) * shape[1]
        return flat[: max(known - start, 0)]

    # ---- sums over all ranks

    def _sums(self, chunks: Sequence[LanguageModule], pieces: Iterator[_Piece]) -> Tensor:
        """[parameters, parts, 4] int64 on the CPU: elements and h of the copy that counts, of all copies together."""
        shapes = {
            self._key(chunk, name): (tensor.shape, partition_dim(name))
            for chunk in chunks
            for name, tensor in self._named(chunk, self._arch)
        }
        if self._rows is None:
            names = {name for names in _everyone(sorted(shapes)) for name in names}
            self._rows = {name: row for row, name in enumerate(sorted(names))}
        device = torch.device("cuda", torch.cuda.current_device())
        table = torch.zeros(len(self._rows), len(_PARTS), 4, dtype=torch.int64, device=device)
        for piece in pieces:
            total = bit_sum(piece.values, piece.start, *shapes[piece.name])
            cell = table[self._rows[piece.name], _PARTS.index(piece.part)]
            added = torch.stack([torch.full_like(total, piece.values.numel()), total]).to(device)
            cell[2:] += added
            if piece.counts:
                cell[:2] += added
        dist.all_reduce(table)
        return table.cpu()


class _OfTensors(Fingerprints):
    """Fingerprints by the Hugging Face tensors that weights are made of, which neither class of models nor
    implementation of layers changes."""

    def _key(self, chunk: LanguageModule, name: str) -> str:
        read_as = _EMBEDDING if chunk.share_embeddings_and_output_weights and name == _HEAD else name
        return " ".join(hf_names(self._arch, read_as, **first_indices(chunk, self._arch)))


def weights_digest(
    args: argparse.Namespace, arch: Architecture, chunks: Sequence[LanguageModule], dtype: str | None = None
) -> tuple[str, str] | None:
    """(SHA-256, dtype) over the bits of a model's weights, adapters left out, the same at any layout; collective over
    all ranks. None where the model does not hold numbers of that dtype exactly.

    chunks: of this rank, without wrappers. dtype: that the weights are taken in, default the model's.
    """
    ours = str(args.params_dtype)
    taken = dtype or ours
    if not _holds_exactly(ours, taken):
        return None
    prints = _OfTensors(args, arch, weights)
    pieces = (piece for piece in prints._pieces(chunks, None, dtype=getattr(torch, taken.removeprefix("torch."))))
    table = prints._sums(chunks, (piece for piece in pieces if piece.counts))
    sums = {name: table[row, _PARTS.index(_WEIGHTS), :2].tolist() for name, row in prints._rows.items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest(), taken


def _holds_exactly(ours: str, other: str) -> bool:
    """Whether numbers of another dtype are exact in ours."""
    return ours == other or (ours == "torch.float32" and other in _NARROWER)


def _compare_sums(
    rows: dict[str, dict], saved: dict, parts: Sequence[str], directory: str, step_flag: str = "--ckpt-step"
) -> int:
    """How many tensors of these parts were compared; ValueError where one differs. rows: those of _sums() by name."""
    problems, compared = [], 0
    for name, of_parts in rows.items():
        stored = saved["parameters"].get(name, {})
        for part in parts:
            _, _, count, total = of_parts[part]
            if part not in stored or count == 0:
                continue
            compared += 1
            elements, expected = stored[part]
            # Every replica has been added up.
            replicas, rest = divmod(count, elements)
            if rest or replicas == 0 or wrapped(replicas * expected) != total:
                problems.append((part, name))
    if problems:
        raise ValueError(_refusal(directory, problems, compared, step_flag))
    return compared


def _refusal(directory: str, problems: list[tuple[str, str]], compared: int, step_flag: str) -> str:
    # In float32 the master weights are loaded into the model's.
    masters = {name for part, name in problems if part == MASTER}
    problems = [(part, name) for part, name in problems if part != _WEIGHTS or name not in masters]
    part, name = problems[0]
    others = f", nor are {len(problems) - 1} more of {compared} tensors" if len(problems) > 1 else ""
    load, number = Path(directory).parent, Path(directory).name.removeprefix("iter_").lstrip("0")
    earlier = newest_complete(load, but=number or "0")
    advice = [] if earlier is None else [f"{step_flag} {earlier}"]
    if all(part != _WEIGHTS for part, _ in problems):
        advice.append("--no-load-optim for the weights alone")
    advice.append("the layout that it was saved at")
    anew = "import the model anew, or " if Path(directory).name == "release" else ""
    return (
        f"{directory}: {part} of {name} are not what was saved{others}: a file is damaged, or not restored as it "
        f"was saved; {anew}give {', '.join(advice[:-1])}{' or ' if len(advice) > 1 else ''}{advice[-1]}"
    )


def optimizer_states(optimizer) -> Iterator[tuple[Tensor, int, dict[str, Tensor], int | None]]:
    """Each parameter that an optimizer of this rank updates, where its share of it starts, the share's tensors by part,
    and which replica of it this is; None where the whole parameter is there: that of the parameter then."""
    for one in getattr(optimizer, "chained_optimizers", [] if optimizer is None else [optimizer]):
        if getattr(one, "is_stub_optimizer", False):
            continue
        if hasattr(one, "gbuf_ranges"):
            for parameter, share in distributed_shares(one):
                tensors = dict(one._get_main_param_and_optimizer_states(parameter))
                tensors[MASTER] = tensors.pop("param")
                yield parameter, share.start, _of_one_length(tensors), one.distributed_optimizer_instance_id
            continue
        pairs = [(p, p) for group in one.optimizer.param_groups for p in group["params"]]
        if hasattr(one, "float16_groups"):
            groups = zip(one.float16_groups, one.fp32_from_float16_groups, strict=True)
            pairs = [pair for models, mains in groups for pair in zip(models, mains, strict=True)]
            pairs += [(p, p) for group in one.fp32_from_fp32_groups for p in group]
        for parameter, main in pairs:
            tensors = {} if main is parameter else {MASTER: main}
            yield parameter, 0, _of_one_length(tensors | dict(one.optimizer.state.get(main, {})), main), None


def distributed_shares(optimizer) -> Iterator[tuple[Tensor, Any]]:
    """The parameters of which this rank has a share in a distributed optimizer, and where in the whole parameter the
    share is (start, end); nothing for another optimizer."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for of_dtypes in getattr(one, "gbuf_ranges", ()):
            for buckets in of_dtypes.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield parameter, ranges["param"]


def _of_one_length(tensors: dict[str, Any], like: Tensor | None = None) -> dict[str, Tensor]:
    """Those that have a value for each element."""
    length = (tensors[MASTER] if like is None else like).numel()
    return {key: t for key, t in tensors.items() if isinstance(t, Tensor) and t.numel() == length and t.dim() > 0}


def _step(optimizer) -> int | None:
    """Steps that the optimizer says it has made; None where it does not."""
    steps = []
    for one in getattr(optimizer, "chained_optimizers", [] if optimizer is None else [optimizer]):
        for group in [] if getattr(one, "is_stub_optimizer", False) else one.optimizer.param_groups:
            if group["params"] and "step" in group:
                steps.append(int(group["step"]))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, max(steps, default=None))
    return max((step for step in everyone if step is not None), default=None)


def _replica(name: str) -> int:
    """Which of the data-parallel replicas of a parameter this rank has."""
    if is_expert(name):
        return parallel_state.get_expert_data_parallel_rank()
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def _everyone(value) -> list:
    """What the ranks of all pipeline stages and all groups of experts have."""
    groups = (parallel_state.get_expert_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group())
    values = [value]
    for group in groups:
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, values, group=group)
        values = [one for found in gathered for one in found]
    return values


def saved_fingerprint(directory: str) -> tuple[dict | None, bool]:
    """The fingerprint of a checkpoint, if any, and whether it has the optimizer's state."""
    from megatron.core import dist_checkpointing

    if not dist_checkpointing.check_is_distributed_checkpoint(directory):
        return None, True
    saved = dist_checkpointing.load_common_state_dict(directory).get("args")
    return getattr(saved, ATTRIBUTE, None), not getattr(saved, "no_save_optim", False)


_OLD_STATE = (
    "the checkpoint was saved so, as versions without a fingerprint did with several gradient buckets: give "
    "--no-load-optim for the weights alone"
)
