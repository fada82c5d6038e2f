"""Before a training: are all ranks started alike? Compared over the launcher's key-value store.

That works before any process group exists, whose making already hangs where ranks disagree about the layout. For n
ranks: n writes and one read of all by rank 0, then one read and one write by each.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from qtarget_megatron._version import versions
from qtarget_megatron.resumable import file_digest

# What these name is compared by its contents: nodes may have copies of their own.
_FILES = ("objective_file",)
_MODELS = ("hf_model", "lora_from", "teacher_hf", "teacher_cache", "teacher_cache_valid")
_FREE = {*_FILES, *_MODELS, "sft_train", "sft_valid", "tensorboard_dir", "wandb_save_dir", "local_rank"}
_TEXTS = (".json", ".jinja", ".model", ".txt")
_starts = itertools.count()


def identity(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, str]:
    """What must be the same on all ranks, as texts by name: versions, the flags of argv, and contents of files.

    Of data args.data_digest says it. --objective-file is read whole, of models and caches the small files; the others
    have the same size.
    """
    found = {"versions": versions()}
    for word in argv:
        flag = word.partition("=")[0]
        key = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and key not in _FREE:
            found[flag] = f"{flag} {getattr(args, key, '')}".strip()
    digests = dict(args.data_digest)
    for key, digest in (*((key, file_digest) for key in _FILES), *((key, _contents_digest) for key in _MODELS)):
        if (paths := getattr(args, key)) is not None:
            digests[key] = [digest(path) for path in (paths if isinstance(paths, list) else [paths])]
    for key, of_paths in digests.items():
        flag = f"--{key.replace('_', '-')}"
        found[flag] = f"{flag} of SHA-256 {' '.join(digest[:16] for digest in of_paths)}"
    return found


def _contents_digest(directory: Path) -> str:
    """Digest of the names and sizes of a directory's files, and of the contents of the texts among them."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).iterdir()):
        if path.is_file() and not path.name.startswith("."):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            if path.suffix in _TEXTS:
                try:
                    digest.update(path.read_bytes())
                except OSError as error:
                    raise ValueError(f"{path}: {error.strerror}: make it readable, or remove it") from error
    return digest.hexdigest()


def difference(identities: Sequence[Mapping[str, str]]) -> str | None:
    """How ranks differ, in words; None where all are alike. identities: of each rank, in order.

    What most ranks have (of as many, what the first has) is taken for right."""
    for name in dict.fromkeys(name for found in identities for name in found):
        values = [found.get(name, f"no {name}") for found in identities]
        counts = Counter(values)
        if len(counts) > 1:
            usual = max(values, key=lambda value: counts[value])
            first = next(value for value in values if value != usual)
            others = [rank for rank, value in enumerate(values) if value == first]
            return f"rank {values.index(usual)} has {usual}, {_ranks(others)} {first}: start all ranks alike"
    return None


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {', '.join(map(str, ranks[:8]))}{more} have"


def open_store(args: argparse.Namespace) -> dist.Store | None:
    """The key-value store that the ranks meet at, for pretrain() to go on with; None under --fake-process-group.

    It is the one of the process group where there is one already. A single rank needs no address.
    """
    if args.fake_process_group:
        return None
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if args.world_size == 1:
        return dist.HashStore()
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    store, _, _ = next(rendezvous("env://", args.rank, args.world_size, timeout=timeout))
    store.set_timeout(timeout)
    return store


def for_this_run(store: dist.Store) -> dist.Store:
    """The store with keys of its own for each training of a process; call it once for each, on all ranks."""
    return dist.PrefixStore(f"qtarget-{next(_starts)}", store)


def agree(store: dist.Store, rank: int, world_size: int, mine: Mapping[str, str], lead: Callable[[], Any]) -> Any:
    """What lead() returns on rank 0 (JSON), on every rank, once all have been found alike.

    mine: the identity of this rank. ValueError on every rank where ranks differ, where some do not come within the
    store's timeout, or where lead raises it.
    """
    keys = [f"rank-{number}" for number in range(world_size)]
    store.set(keys[rank], json.dumps(dict(mine)))
    if rank == 0:
        verdict: dict[str, Any] = {"error": _compare(store, keys)}
        if verdict["error"] is None:
            try:
                verdict["value"] = lead()
            except ValueError as error:
                verdict["error"] = str(error)
        store.set("verdict", json.dumps(verdict))
    try:
        verdict = json.loads(store.get("verdict"))
    except dist.DistStoreError as error:
        seconds = store.timeout.total_seconds()  # type: ignore[attr-defined]  # not in torch's stubs
        raise ValueError(f"rank 0 has not answered within {seconds:g} s: see the output there") from error
    store.set(f"told-{rank}", "")
    if rank == 0:
        # It may host the store, and be about to end: not before the others have read from it.
        with contextlib.suppress(dist.DistStoreError):
            there = [number for number, key in enumerate(keys) if store.check([key])]
            store.wait([f"told-{number}" for number in there], timedelta(seconds=20))
    if verdict["error"] is not None:
        raise ValueError(verdict["error"])
    return verdict["value"]


def _compare(store: dist.Store, keys: list[str]) -> str | None:
    try:
        store.wait(keys)
    except dist.DistStoreError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        seconds = store.timeout.total_seconds()  # type: ignore[attr-defined]  # not in torch's stubs
        return f"{_ranks(missing)} not started within {seconds:g} s: see the output there"
    return difference([json.loads(value) for value in store.multi_get(keys)])
