"""Changes to files as damage and malice make them, and a watch over what reading them does."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ODD_VALUES = (
    None,
    True,
    -1,
    0,
    7,
    2**31,
    10**18,
    1e308,
    "",
    "x" * 2000,
    "../../../etc/passwd",
    "/etc/passwd",
    "@os.system()",
    "planted_module.run",
    "__import__('planted_module')",
    [],
    {},
    ["planted_module"],
    [[[]]],
    {"factory": "planted_module.run", "arguments": {}},
    {"own": "planted_module.run"},
)
TEXTS = (b"", b"null", b"[]", b"{}", b"[" * 100_000, b"1" * 10_000, b'{"a": NaN}', b"\xff\xfe")
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.startfile")
_FORBIDDEN += ("subprocess.Popen", "pickle.find_class", "socket.connect", "ctypes.dlopen")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_found: list[str] | None = None
_allowed: tuple[str, ...] = ()


def _audit(event: str, arguments: tuple) -> None:
    if _found is None:
        return
    if event in _FORBIDDEN:
        _found.append(f"{event} {arguments!r:.200}")
    elif event == "import" and str(arguments[0]).startswith("planted_module"):
        _found.append(f"import {arguments[0]}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & _WRITING
        if writes and not os.path.realpath(os.fsdecode(path)).startswith(_allowed):
            _found.append(f"open {path!r} for writing")


sys.addaudithook(_audit)


@contextmanager
def watched(*allowed: str | os.PathLike[str]) -> Iterator[list[str]]:
    """Collects what must not happen: programs, pickles, planted imports, files written elsewhere.

    Args:
      *allowed: Folders that may be written to.
    """
    global _found, _allowed
    _found, _allowed = [], tuple(os.path.realpath(folder) for folder in allowed)
    try:
        yield _found
    finally:
        _found = None


def change(path: Path, draw: random.Random, outside: Path) -> None:
    """Changes a file in place, in one of many ways.

    Args:
      path: The file.
      draw: The chance.
      outside: A file elsewhere, to which links lead.
    """
    content = path.read_bytes()
    if draw.random() < 0.04:
        path.unlink()
        _put_in_place(path, draw, outside)
    elif path.suffix == ".json" and draw.random() < 0.75:
        path.write_bytes(_change_json(content, draw))
    elif draw.random() < 0.05:
        path.write_bytes(draw.choice(TEXTS))
    else:
        path.write_bytes(_change_bytes(content, draw))


def _put_in_place(path: Path, draw: random.Random, outside: Path) -> None:
    kind = draw.randrange(5)
    if kind == 0:
        path.symlink_to(outside)
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.mkdir()


def _change_bytes(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    kind = draw.randrange(5)
    if kind == 0:
        return content[: draw.randrange(len(content) + 1)]
    if kind == 1:
        return content + draw.randbytes(draw.randrange(1, 200))
    place = draw.randrange(max(len(content), 1))
    if kind == 2:
        # Sizes and offsets of binary formats.
        changed[place : place + 8] = draw.choice((b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f"))
    elif kind == 3:
        # The first bytes hold headers, the last ones the directory of an archive.
        ends = [*range(min(200, len(content))), *range(max(0, len(content) - 200), len(content))]
        for where in draw.choices(ends, k=draw.randrange(1, 4)):
            changed[where] = draw.randrange(256)
    else:
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _change_json(content: bytes, draw: random.Random) -> bytes:
    value = json.loads(content)
    places = list(_places(value))
    for _ in range(draw.choice((1, 1, 1, 2))):
        holder, key = draw.choice(places)
        if isinstance(holder, dict) and key not in holder:
            continue
        if isinstance(holder, list) and key >= len(holder):
            continue
        kind = draw.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        elif kind == 2 and isinstance(holder, dict):
            holder[draw.choice(("planted_module", "gin", "__class__"))] = copy.deepcopy(holder[key])
        elif kind == 3 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * draw.choice((-1, 1000, 10**9, 0.5))
        else:
            holder[key] = draw.choice(ODD_VALUES)
    return json.dumps(value).encode()


def _places(value: object) -> Iterator[tuple[dict | list, str | int]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        yield value, key
        if isinstance(item, (dict, list)):
            yield from _places(item)
