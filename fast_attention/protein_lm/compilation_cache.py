"""Compiled programs of commands, kept between runs in the user's cache folder.

Compiling takes most of the time of a command on a few proteins. JAX can keep what it has compiled;
this module names the folder: one that only the user can write to, one for each kind of processor,
since a compiled program may not run on another one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import sys
import warnings
from pathlib import Path

MAX_BYTES = 2**30
"""When there is more, the least recently used half is removed."""

_LEAST_SECONDS = 0.1
"""What compiles faster is not kept."""


def keep_compiled_programs() -> None:
    """Makes JAX keep what it compiles, in `cache_folder`.

    Does nothing if ``JAX_COMPILATION_CACHE_DIR`` is set, also to an empty text, which does without
    a cache, or if there is no such folder, it cannot be made or belongs to another user.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or (folder := cache_folder()) is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
            return
        shrink(folder, MAX_BYTES)
    except OSError:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    # Such as half an entry of a process that was killed, or a full disk: it is compiled anew.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation")


def cache_folder() -> Path | None:
    """The folder of this processor, below that which the system has for caches.

    None for a user without a home folder. A relative ``XDG_CACHE_HOME`` is ignored, as its
    specification says: programs beside the data are not run.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if sys.platform == "darwin":
        above = home and home / "Library" / "Caches"
    else:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        above = given if given.is_absolute() else home and home / ".cache"
    if above is None or not above.is_absolute():
        return None
    return above / "fast-attention" / f"programs-{_processor()}"


def _processor() -> str:
    """A short digest of what the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = sorted(
            {line for line in lines if line.startswith(("flags", "Features", "model name"))}
        )
    except OSError:
        told = [platform.processor()]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:12]


def shrink(folder: Path, most: int) -> None:
    """Removes the files that were used least recently until half of `most` is left, if it is more.

    Args:
      folder: With files that another process may remove at the same time.
      most: Bytes that are allowed.
    """
    files = []
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            found = entry.stat(follow_symlinks=False)
            files.append((max(found.st_atime, found.st_mtime), found.st_size, entry.path))
    size = sum(bytes_ for _, bytes_, _ in files)
    if size <= most:
        return
    for _, bytes_, path in sorted(files):
        if size <= most // 2:
            return
        Path(path).unlink(missing_ok=True)
        size -= bytes_
