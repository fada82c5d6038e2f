"""What has run out, in words: files, memory, shared memory, processes, and the remedy."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator

import torch

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNUSABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_UNUSABLE |= {errno.EIO, errno.ESTALE}
# Where only a text is left of an error: torch's own, and those of data workers.
_SHARED_MEMORY = re.compile(r"\bshm\b|shared memory|bus error|</?torch_\d+_\d+", re.IGNORECASE)
_FILES = re.compile(r"too many open files|0 items of ancdata", re.IGNORECASE)
_GPU = re.compile(r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory")
_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|bad_alloc|std::bad_alloc", re.IGNORECASE)
_PROCESSES = re.compile(r"can't start new thread|resource temporarily unavailable", re.IGNORECASE)


def what_ran_out(error: BaseException) -> str | None:
    """One line that names what ran out, or the file that cannot be used; None where it was nothing of that kind.

    Looks at the error and those that it came from."""
    return next((line for link in _chain(error) if (line := _of(link)) is not None), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _of(error: BaseException) -> str | None:
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, torch.OutOfMemoryError) or (_is_general(error) and _GPU.search(text)):
        return (
            f"the memory of the GPU ran out on rank {os.environ.get('RANK', '0')} ({_first_line(text)}): see what a "
            "layout needs (python -m qtarget_megatron.plan); a smaller --micro-batch-size or --qtarget-chunk-size, "
            "--recompute-activations, --use-distributed-optimizer, or more ranks a model take less"
        )
    if number in (errno.EMFILE, errno.ENFILE) or (_is_general(error) and _FILES.search(text)):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"there are too many open files (the limit is {soft} a process): raise it: ulimit -n {max(hard, 65536)}"
    if isinstance(error, OSError) and number in _NO_SPACE:
        return f"{error.filename or 'a file'} could not be written: {error.strerror}"
    if _is_general(error) and _SHARED_MEMORY.search(text):
        return (
            f"shared memory ran out ({_first_line(text)}): make /dev/shm larger (docker run --shm-size), or give "
            "--num-workers 0"
        )
    if isinstance(error, MemoryError) or number == errno.ENOMEM or (_is_general(error) and _MEMORY.search(text)):
        return (
            f"the memory of this machine ran out, or what this process may have of it (ulimit -v, the job's limit) "
            f"({_first_line(text)}): fewer ranks on a node, a smaller --micro-batch-size or fewer --num-workers take "
            "less"
        )
    if number == errno.EAGAIN or (_is_general(error) and _PROCESSES.search(text)):
        return f"no process or thread could be started ({_first_line(text)}): raise the limit: ulimit -u"
    if isinstance(error, OSError) and number in _UNUSABLE:
        return f"{error.filename or 'a file'} could not be opened or written: {error.strerror}"
    return None


def _is_general(error: BaseException) -> bool:
    """Whether only the text says what happened. A ValueError's is for the user already."""
    return isinstance(error, RuntimeError | OSError) and getattr(error, "errno", None) is None


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else "no details"
