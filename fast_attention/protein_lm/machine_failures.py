"""Failures of the machine: memory, disk and network, as opposed to damaged or wrong files.

Libraries wrap these failures in errors of their own (tensorstore raises ValueError for a failed
read), so the type alone is not enough: the error number, the text and the causes are looked at.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator

OUT_OF_MEMORY = "out of memory"

_TRY_AGAIN = "the files themselves may be intact, so check the disk or the network, and try again"
_READ = f"a read error of the disk or the network: {_TRY_AGAIN}"
_FULL = "the disk is full: make room, or write elsewhere"

_REASONS = {
    errno.ENOMEM: OUT_OF_MEMORY,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "the disk quota is used up: make room, or write elsewhere",
    errno.EFBIG: "a file is larger than the limit of this system: raise the limit, or write "
    "elsewhere",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "permission denied: change the permissions",
    errno.EPERM: "permission denied: change the permissions",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine: close other programs",
} | dict.fromkeys(
    (
        errno.EIO,
        errno.ESTALE,
        errno.EINTR,
        errno.EAGAIN,
        errno.EBUSY,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ECONNRESET,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    ),
    _READ,
)
_BY_TEXT = {os.strerror(number): reason for number, reason in _REASONS.items()}
_NUMBER = re.compile(r"\b(?:OS error|errno|Errno)[ :=]*(\d+)")
_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|[Oo]ut of memory|std::bad_alloc|Unable to allocate|Cannot allocate memory"
)

_MEMORY_OPTIONS = {
    "tokens_per_batch": "a smaller --tokens_per_batch",
    "batch_size": "a smaller --batch_size",
    "max_length": "a smaller --max_length",
}


def machine_failure(error: BaseException) -> str | None:
    """Says which failure of the machine an error is about, and what to do.

    Args:
      error: Any error; its causes are looked at, too.

    Returns:
      A part of a sentence such as ``"the disk is full: make room, or write elsewhere"``; None for
      an error that has another reason.
    """
    for one in _chain(error):
        if isinstance(one, MemoryError):
            return OUT_OF_MEMORY
        if isinstance(one, OSError) and one.errno is not None:
            if one.errno in _REASONS:
                return _REASONS[one.errno]
            continue
        text = str(one)
        if _NO_MEMORY.search(text):
            return OUT_OF_MEMORY
        for number in _NUMBER.findall(text):
            if int(number) in _REASONS:
                return _REASONS[int(number)]
        for reason, told in _BY_TEXT.items():
            if reason in text:
                return told
    return None


def memory_remedy(options: Collection[str]) -> str:
    """What helps against too little memory.

    Args:
      options: The names of the options that the command has.
    """
    known = [remedy for name, remedy in _MEMORY_OPTIONS.items() if name in options]
    return f"take {' or '.join(known)}" if known else "close other programs, or take fewer proteins"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            context = None if one.__suppress_context__ else one.__context__
            waiting.append(one.__cause__ or context)
            if isinstance(one, BaseExceptionGroup):
                waiting += one.exceptions
