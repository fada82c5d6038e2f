"""Which iteration a training continues from, and whether its files are all there.

Checked are presence and sizes, not contents (which fingerprint.py compares once they are loaded): metadata.json, which
Megatron writes when everything else is written, must be JSON of its format; .metadata must be a whole pickle, and every
.distcp file as long as the pieces that it says lie in it. It is read opcode by opcode: nothing is unpickled. Nothing
here imports Megatron.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickletools
import re
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    iteration: of the checkpoint, None without one.
    messages:  for the user.
    """

    iteration: int | None = None
    messages: tuple[str, ...] = ()


def prepare_start(args: argparse.Namespace) -> Start:
    """Find the iteration that --load and --ckpt-step ask for; on one rank, before Megatron reads it.

    ValueError where it is not complete, with the newest one that is. With --ckpt-step the tracker file then names that
    iteration where it named none, and where the training saves to the same directory; later iterations there are moved
    aside, so that a save over one that is cut short leaves no mixture of both.
    """
    if args.load is None:
        return Start()
    load, step = Path(args.load), args.ckpt_step
    named, problem = _tracked(load)
    chosen = named if step is None else str(step)
    if chosen is None:
        if problem is None and newest_complete(load) is None:
            return Start()
        _refuse(load, problem or f"{TRACKER} is missing")
    if args.ckpt_format == "torch_dist":
        damage = find_damage(_folder(load, chosen))
        if damage is not None:
            _refuse(load, damage, but=chosen)
    if chosen == _RELEASE:
        return Start(0)
    messages = []
    resumes = args.save is not None and Path(args.save).absolute() == load.absolute() and not args.finetune
    if step is not None and named != chosen and (named is None or resumes):
        _set_tracker(load, chosen)
        messages.append(f"{load / TRACKER} says {chosen} now, as --ckpt-step does; drop the flag next time")
    if resumes:
        messages += [
            f"continuing from iteration {chosen}; {old} is newer and was moved to {new}"
            for old, new in _move_aside(load, int(chosen))
        ]
    return Start(int(chosen), tuple(messages))


def names_iteration(load: Path) -> bool:
    """Whether the tracker file of a checkpoint directory names what to load."""
    return _tracked(load)[0] is not None


def newest_complete(directory: str | Path, *, but: str | None = None) -> int | None:
    """The newest iteration in a checkpoint directory whose files are all there, other than but."""
    numbers = sorted((number for number, _ in _iterations(Path(directory)) if str(number) != but), reverse=True)
    return next((n for n in numbers if find_damage(_folder(Path(directory), str(n))) is None), None)


def newest_iteration(save: str | Path) -> int | None:
    """The iteration that the tracker file of a checkpoint directory names; None without one."""
    named, _ = _tracked(Path(save))
    return None if named in (None, _RELEASE) else int(named)


def advice(args: argparse.Namespace) -> str:
    """How to go on after a training has ended early."""
    if args.save is None:
        return "nothing was saved, as --save was not given"
    named, _ = _tracked(Path(args.save))
    iteration = named if named is not None else newest_complete(args.save)
    if iteration is None:
        return "no checkpoint was saved yet: the same command starts anew"
    same = args.load is not None and Path(args.load).absolute() == Path(args.save).absolute()
    words = ["the same command"] + ([] if same else [f"--load {args.save}"])
    words += [] if named is not None else [f"--ckpt-step {iteration}"]
    return f"{' with '.join(words[:2])}{''.join(f' {word}' for word in words[2:])} continues from iteration {iteration}"


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of one iteration, in words; None for a complete one, or one of another format."""
    if not folder.is_dir():
        return f"{folder.name} is missing"
    if any(folder.glob("mp_rank_*")):
        return None
    try:
        if json.loads((folder / "metadata.json").read_text())["sharded_backend"] != "torch_dist":
            return None
    except FileNotFoundError:
        return f"{folder.name}/metadata.json is missing: it was not written to its end"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{folder.name}/metadata.json is damaged"
    try:
        sizes, holds_common = _stored_sizes((folder / ".metadata").read_bytes())
    except FileNotFoundError:
        return f"{folder.name}/.metadata is missing"
    except ValueError:
        return f"{folder.name}/.metadata is damaged"
    for name, expected in sorted(sizes.items()):
        path = folder / name
        if not path.is_file():
            return f"{folder.name}/{name} is missing"
        if (size := path.stat().st_size) < expected:
            return f"{folder.name}/{name} has {size} bytes, {expected} expected"
    common = folder / "common.pt"
    if common.exists():
        # torch.save's file is a zip archive, whose directory is at its end.
        return None if zipfile.is_zipfile(common) else f"{folder.name}/common.pt is damaged"
    return None if holds_common else f"{folder.name}/common.pt is missing"


def _stored_sizes(metadata: bytes) -> tuple[dict[str, int], bool]:
    """File -> bytes that .metadata says it has at least, and whether it holds what older checkpoints have in common.pt.

    torch pickles for each piece {"relative_path": file, "offset": first byte, "length": bytes}.
    """
    sizes: dict[str, int] = {}
    holds_common = False
    window: deque = deque(maxlen=6)
    for constant in _constants(metadata):
        window.append(constant)
        holds_common |= isinstance(constant, str) and constant.startswith("common_state")
        match list(window):
            case ["relative_path", str(name), "offset", int(offset), "length", int(length)]:
                sizes[name] = max(sizes.get(name, 0), offset + length)
    if not sizes:
        raise ValueError("no file is named")
    return sizes, holds_common


def _constants(pickled: bytes) -> Iterator[str | int]:
    """The strings and integers of a pickle in the order in which they would be put on the stack; runs none of it.

    ValueError where it is cut short."""
    memo: dict[int, str | int | None] = {}
    last: str | int | None = None
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name.endswith("PUT"):
            memo[int(argument)] = last
        else:
            if opcode.name.endswith("GET"):
                last = memo.get(int(argument))
            else:
                last = argument if "UNICODE" in opcode.name or "INT" in opcode.name else None
            if last is not None:
                yield last


def _tracked(load: Path) -> tuple[str | None, str | None]:
    """What the tracker file names (an iteration or "release"), or what is wrong with it; neither without one."""
    try:
        text = (load / TRACKER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"{TRACKER} cannot be read ({error.strerror})"
    if text == _RELEASE or re.fullmatch(r"[0-9]+", text):
        return text if text == _RELEASE else str(int(text)), None
    return None, f"{TRACKER} is empty" if not text else f"{TRACKER} names no iteration, but {text[:20]!r}"


def _refuse(load: Path, problem: str, *, but: str | None = None) -> None:
    newest = newest_complete(load, but=but)
    if newest is None:
        advice = "no other iteration is complete: restore the file, or start anew with another directory"
    else:
        advice = f"iteration {newest} is complete: give --ckpt-step {newest} to continue from it"
    raise ValueError(f"--load {load}: {problem}; {advice}")


def iteration_folder(load: str | Path, iteration: int) -> Path:
    """Where an iteration lies in a checkpoint directory."""
    return Path(load) / f"iter_{iteration:07d}"


def _folder(load: Path, chosen: str) -> Path:
    return load / _RELEASE if chosen == _RELEASE else iteration_folder(load, int(chosen))


def _iterations(load: Path) -> Iterator[tuple[int, Path]]:
    for folder in load.glob("iter_*"):
        if re.fullmatch(r"iter_[0-9]{7,}", folder.name):
            yield int(folder.name.removeprefix("iter_")), folder


def _set_tracker(load: Path, chosen: str) -> None:
    """All of it or nothing: Megatron's own write empties the file first."""
    new = load / f".{TRACKER}.new"
    try:
        with new.open("w") as file:
            file.write(chosen)
            file.flush()
            os.fsync(file.fileno())
        new.replace(load / TRACKER)
    except OSError as error:
        raise ValueError(f"{load / TRACKER}: {error.strerror}: make it writable, or write {chosen} there") from error


def _move_aside(load: Path, step: int) -> Iterator[tuple[str, str]]:
    for number, folder in sorted(_iterations(load)):
        # Without metadata.json nobody takes it for a checkpoint.
        if number > step and (folder / "metadata.json").exists():
            names = (f"{folder.name}.aside{suffix}" for suffix in itertools.chain([""], itertools.count(2)))
            target = next(load / name for name in names if not (load / name).exists())
            folder.rename(target)
            yield folder.name, target.name
