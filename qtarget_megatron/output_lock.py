"""One writer for each output: a lock file that names the process, and counts no more once that has ended.

Two signs of life. The kernel's record lock ends with the process, however that ends; file systems with locks of the
whole cluster (NFS, GPFS, Lustre mounted with flock) know it on other hosts too. Where the kernel cannot tell, a number
in the file counts: its holder changes it every BEAT seconds, and who finds the file waits PATIENCE seconds for that.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEAT, PATIENCE = 20.0, 120.0  # seconds
_log = logging.getLogger("qtarget_megatron")
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@dataclass
class _Held:
    """A lock of this process.

    made: folders that were made for it, outermost first.
    ours: what it says of the holder, without the beat.
    """

    descriptor: int
    made: list[Path]
    ours: dict[str, Any]
    process: int = field(default_factory=os.getpid)
    ended: threading.Event = field(default_factory=threading.Event)


_held: dict[Path, _Held] = {}


def claim(path: Path, what: str) -> None:
    """Take the lock file ``path`` for this process, until release() or its end; missing folders are made.

    what: names the output in messages. What this process holds already it keeps. Logs a line where a process that
    has ended left the file, and before it waits. ValueError where another process holds it, or it cannot be written.
    """
    path = Path(path).absolute()
    if path in _held and _held[path].process == os.getpid():
        return
    made = _make_folders(path.parent, what)
    try:
        descriptor, kernel_knows = _open_locked(path, what)
        try:
            _check_left(path, descriptor, kernel_knows, what)
            ours = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            }
            held = _Held(descriptor, made, ours)
            _write(held, 0)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        _remove(made)
        raise ValueError(f"{what} cannot be written: {path.parent}: {error.strerror}") from error
    except BaseException:
        _remove(made)
        raise
    _held[path] = held
    threading.Thread(target=_beat, args=(path, held), name="output-lock", daemon=True).start()


def probe(folder: Path, what: str) -> None:
    """ValueError where no file can be written in a folder, or it cannot be made. Leaves nothing."""
    made = _make_folders(Path(folder).absolute(), what)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(f"{what} cannot be written: {error.strerror}") from error
    finally:
        _remove(made)


def release(path: Path) -> None:
    """Let a lock go, if this process holds it; folders that were made for it and are empty go too."""
    path = Path(path).absolute()
    held = _held.get(path)
    if held is None or held.process != os.getpid():  # a forked process has the table, not the locks
        return
    del _held[path]
    held.ended.set()
    with contextlib.suppress(OSError):
        if _is_at(path, held.descriptor):
            path.unlink()
    os.close(held.descriptor)
    _remove(held.made)


@atexit.register
def release_all() -> None:
    """Let go what this process holds."""
    for path in list(_held):
        release(path)


def _make_folders(folder: Path, what: str) -> list[Path]:
    missing = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            made.append(parent)
    except OSError as error:
        _remove(made)
        raise ValueError(f"{what} cannot be written: {parent}: {error.strerror}") from error
    return made


def _remove(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty
        for folder in reversed(folders):
            folder.rmdir()


def _open_locked(path: Path, what: str) -> tuple[int, bool]:
    """(the open file, whether the kernel keeps others of this machine out)."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        kernel_knows = True
        try:
            # Not flock, which the processes that this one forks would hold as well.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = _read(descriptor)
                os.close(descriptor)
                raise _in_use(what, holder) from None
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            kernel_knows = False
        if _is_at(path, descriptor):
            return descriptor, kernel_knows
        os.close(descriptor)  # its holder has removed it since


def _check_left(path: Path, descriptor: int, kernel_knows: bool, what: str) -> None:
    """Say who left the file; ValueError where that process lives."""
    left = _read(descriptor)
    if left is None:
        return
    if not (kernel_knows and left.get("host") == socket.gethostname()):
        _log.info("%s is of %s: waiting %g s for a sign of life", path, _who(left), PATIENCE)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(2.0, PATIENCE / 10))
            if _read_again(path, descriptor, kernel_knows) != left:
                raise _in_use(what, left, f"; where that is gone for certain, delete {path}")
    _log.info("%s was left by %s, which has ended: going on", path, _who(left))


def _in_use(what: str, holder: dict[str, Any] | None, more: str = "") -> ValueError:
    return ValueError(f"{what} is being written by {_who(holder)}: wait for its end, or choose another{more}")


def _who(holder: dict[str, Any] | None) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')}, started {holder.get('since')}"


def _read(descriptor: int) -> dict[str, Any] | None:
    """What the file says; {} where that is not readable, None where it is empty."""
    text = os.pread(descriptor, 4096, 0)
    with contextlib.suppress(ValueError, TypeError):
        return dict(json.loads(text)) if text else None
    return {}


def _read_again(path: Path, descriptor: int, kernel_knows: bool) -> dict[str, Any] | None:
    """The same, as other hosts have left it: a network file system looks for changes when a file is locked or opened.

    Not opened where this process has the lock: closing any descriptor of the file would end it."""
    if kernel_knows:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _read(descriptor)
    with contextlib.suppress(FileNotFoundError):
        other = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(other)
        finally:
            os.close(other)
    return None


def _write(held: _Held, beat: int) -> None:
    text = json.dumps(held.ours | {"beat": beat}).encode()
    os.pwrite(held.descriptor, text, 0)
    os.ftruncate(held.descriptor, len(text))


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _beat(path: Path, held: _Held) -> None:
    beat = 0
    while not held.ended.wait(BEAT):
        beat += 1
        with contextlib.suppress(OSError):  # a disk that is full or away shows elsewhere
            found = _read(held.descriptor)
            taken = bool(found and any(found.get(key) != value for key, value in held.ours.items()))
            if taken or (path.exists() and not _is_at(path, held.descriptor)):
                # Not logged: a process that ends here must have said why.
                print(
                    f"qtarget_megatron: error: {path} was taken by {_who(found)}: ending", file=sys.stderr, flush=True
                )
                os._exit(1)
            _write(held, beat)
