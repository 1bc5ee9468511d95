"""Results of a long command in parts, from which the same command resumes after it was stopped.

The proteins, or the mutants of one, are computed window by window. The results of each window are a
file in a folder beside the output, ``<output>.partial``, which is removed when the output is
complete. A part has a digest of its settings and its content, so that a part of other proteins, an
empty or a damaged one is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from fast_attention.arrays.dtypes import is_random_key
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.npz_files import check_npz, read_arrays
from fast_attention.protein_lm.files.output_files import open_output, write_json
from fast_attention.protein_lm.files.output_targets import describe, is_special
from fast_attention.protein_lm.inference.model_inputs import naming_the_longest
from fast_attention.protein_lm.machine_failures import machine_failure
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.encoding import Encoded, encode_sequences

_MANIFEST = "manifest.json"
_PART = re.compile(r"\d{6}\.npz")
_TEMPORARY = re.compile(r"\.(manifest\.json|\d{6}\.npz)\..*")

Arrays = dict[str, np.ndarray]
Found = TypeVar("Found")


class Protein(NamedTuple):
    """A record as a model reads it.

    Attributes:
      id: Of the record.
      residues: How many the record has.
      encoded: Those that are read.
    """

    id: str
    residues: int
    encoded: Encoded

    @property
    def read(self) -> int:
        """How many residues are read."""
        return len(self.encoded.residues)


class Done(NamedTuple):
    """What was made of the proteins of some files.

    Attributes:
      proteins: How many there were.
      residues: How many of their residues were read by the model.
      longer: How many proteins have more residues than the model's domain.
      computed: Residues of this call, without those that an earlier one had computed.
    """

    proteins: int = 0
    residues: int = 0
    longer: int = 0
    computed: int = 0


class Part(NamedTuple):
    """A window whose results are stored, see `read_part`.

    Attributes:
      number: From 0.
      digest: Of the window.
      proteins: Its proteins.
      done: What was done up to it, itself included.
    """

    number: int
    digest: str
    proteins: list[Protein]
    done: Done


class Work(NamedTuple):
    """The parts of one output.

    Attributes:
      folder: Where they are.
      settings: What the results depend on beside the proteins, as JSON.
    """

    folder: Path
    settings: dict[str, Any]


def settings(
    command: str,
    model: BuiltModel,
    tokens_per_batch: int,
    max_length: int | None,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """What the parts of a command depend on beside the proteins, for `open_work`."""
    return {
        "command": command,
        "model": fingerprint(model),
        "tokens_per_batch": tokens_per_batch,
        "max_length": max_length,
        "devices": model.mesh.size,
        **others,
    }


@contextlib.contextmanager
def open_work(output: str | os.PathLike[str], settings: Mapping[str, Any]) -> Iterator[Work]:
    """Finds the parts of an output, without creating anything beside it.

    The parts of a device, a pipe or standard output are in a temporary folder, and not resumed.

    Args:
      output: The file that is to be written.
      settings: What the results depend on beside the proteins; fit for JSON.

    Raises:
      OutputError: If there can be no such folder.
      RunError: If the folder of the parts has parts of other settings, or other files.
    """
    plain = json.loads(json.dumps(settings))
    if is_special(output):
        with tempfile.TemporaryDirectory(prefix="protein-lm.") as folder:
            yield Work(Path(folder), plain)
        return
    whole = Path(os.path.realpath(output))
    work = Work(whole.with_name(f"{whole.name}.partial"), plain)
    try:
        _check(work)
    except OSError as error:
        raise describe(output, error) from error
    try:
        yield work
    except BaseException:
        # Without a finished part there is nothing to resume from.
        if not any(_PART.fullmatch(name) for name in _names(work.folder)):
            remove_parts(work)
        raise


def _check(work: Work) -> None:
    """Raises RunError if the folder has other files, or parts of other settings."""
    names = _names(work.folder)
    foreign = [name for name in names if not _is_own(name)]
    if foreign:
        raise RunError(
            f"{work.folder} cannot be used: {foreign[0]!r} in it was not written by an interrupted "
            "command; move the folder, or give another output"
        )
    before = _manifest(work.folder)
    if before is None or not any(_PART.fullmatch(name) for name in names):
        return
    changed = [
        f"{name}: {before.get(name)!r} there, {work.settings.get(name)!r} asked for now"
        for name in sorted({*before, *work.settings})
        if before.get(name) != work.settings.get(name)
    ]
    if changed:
        raise RunError(
            f"{work.folder} has the results of a stopped command with other settings "
            f"({'; '.join(changed)}): give the settings of that command to resume it, delete the "
            "folder to start from the beginning, or give another output"
        )


def window_digest(work: Work, names: Iterable[str], proteins: Iterable[Encoded]) -> str:
    """The SHA-256 of the settings and the proteins of a window."""
    return content_digest(
        work,
        (
            f"{name}\0{len(item.residues)} {item.whole}\0".encode() + item.residues.tobytes()
            for name, item in zip(names, proteins, strict=True)
        ),
    )


def content_digest(work: Work, content: Iterable[bytes]) -> str:
    """The SHA-256 of the settings, and of what the results of a part depend on beside them."""
    digest = hashlib.sha256(json.dumps(work.settings, sort_keys=True).encode())
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()


def has_part(work: Work, number: int, digest: str) -> bool:
    """Whether there are results of a window, undamaged and of the same settings and proteins.

    Args:
      work: From `open_work`.
      number: Of the window, from 0.
      digest: From `window_digest` or `content_digest`.

    Raises:
      RunError: If the part cannot be read for lack of memory or a failure of the disk.
    """

    def check(path: Path) -> bool:
        check_npz(path)
        return read_arrays(path, ["digest"])["digest"].item() == digest

    return bool(_try(check, part_path(work, number)))


def read_part(work: Work, number: int, digest: str, names: Sequence[str]) -> Arrays:
    """Reads results of a window of which `has_part` is true, or that `save_part` has written.

    Args:
      work: From `open_work`.
      number: Of the window, from 0.
      digest: From `window_digest` or `content_digest`.
      names: Which arrays to read.

    Raises:
      RunError: If the part was changed, or cannot be read.
    """

    def read(path: Path) -> Arrays | None:
        found = read_arrays(path, [*names, "digest"])
        return found if found.pop("digest").item() == digest else None

    path = part_path(work, number)
    found = _try(read, path)
    if found is None:
        raise RunError(
            f"{path} was changed while the command ran: give the command again, which computes "
            "this part anew"
        )
    return found


def save_part(work: Work, number: int, digest: str, arrays: Arrays) -> None:
    """Writes the results of a window.

    Args:
      work: From `open_work`.
      number: Of the window, from 0.
      digest: From `window_digest` or `content_digest`.
      arrays: The results; none is called ``digest``.

    Raises:
      OutputError: If it cannot be written.
    """
    try:
        work.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise describe(work.folder, error) from error
    if _manifest(work.folder) != work.settings:
        write_json(work.folder / _MANIFEST, work.settings)
    with open_output(part_path(work, number), seekable=True) as file:
        np.savez(file, allow_pickle=False, digest=np.array(digest), **arrays)


def encode_records(
    model: BuiltModel, records: Iterable[FastaRecord], max_length: int | None
) -> Iterator[Protein]:
    """Yields records as a model reads them; see `encode_sequences`."""
    for record in records:
        (encoded,) = encode_sequences(model, [record.sequence], max_length=max_length)
        yield Protein(record.id, len(record.sequence), encoded)


def complete_parts(
    model: BuiltModel,
    work: Work,
    windows: Iterable[list[Protein]],
    compute: Callable[[list[Protein]], Arrays],
    pass_over: Callable[[list[Encoded]], None],
) -> Iterator[Part]:
    """Yields each window when its results are stored.

    Args:
      model: Reads the proteins.
      work: From `open_work`.
      windows: From `token_batches.windows`.
      compute: From the proteins of a window to its results.
      pass_over: Called in place of `compute` where the results are there: it notes the shapes that
        computing would have used, so that what follows is computed as after it.

    Raises:
      RunError: If a window needs more memory than there is; its longest protein is named.
    """
    done = Done()
    for number, proteins in enumerate(windows):
        ids, encoded = [item.id for item in proteins], [item.encoded for item in proteins]
        read = [item.read for item in proteins]
        digest = window_digest(work, ids, encoded)
        resumed = has_part(work, number, digest)
        if resumed:
            pass_over(encoded)
        else:
            with naming_the_longest(ids, read):
                arrays = compute(proteins)
            save_part(work, number, digest, arrays)
        done = Done(
            done.proteins + len(proteins),
            done.residues + sum(read),
            done.longer + sum(residues > model.domain.length for residues in read),
            done.computed + (0 if resumed else sum(read)),
        )
        yield Part(number, digest, proteins, done)


def remove_parts(work: Work) -> None:
    """Removes the folder and the parts in it; files of other names are left, and the folder."""
    for name in _names(work.folder):
        if _is_own(name):
            (work.folder / name).unlink()
    with contextlib.suppress(OSError):
        work.folder.rmdir()


def part_path(work: Work, number: int) -> Path:
    """The file of the window of a number, from 0."""
    return work.folder / f"{number:06}.npz"


def pack_ids(ids: Sequence[str]) -> Arrays:
    """Strings as arrays whose size is that of the text, whatever the longest string is."""
    encoded = [name.encode() for name in ids]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return {"ids_utf8": np.frombuffer(b"".join(encoded), np.uint8), "ids_ends": ends}


def unpack_ids(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The strings of `pack_ids`."""
    text, ends = arrays["ids_utf8"].tobytes(), arrays["ids_ends"].tolist()
    return [text[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def fingerprint(model: BuiltModel) -> str:
    """The SHA-256 of all arrays of a model, and of its shape."""
    digest = hashlib.sha256(f"{model.objective} {model.config}".encode())
    for leaf in jax.tree.leaves((model.weights, model.variables)):
        if is_random_key(leaf):
            leaf = jax.random.key_data(leaf)
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _try(read: Callable[[Path], Found], path: Path) -> Found | None:
    """What a function makes of a file, or None where the file is absent or damaged."""
    try:
        return read(path)
    except Exception as error:
        if (reason := machine_failure(error)) is not None:
            raise RunError(f"{path} cannot be read now: {reason}") from error
        return None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise RunError(f"{folder} is not a folder: move it, or give another output") from None


def _is_own(name: str) -> bool:
    return name == _MANIFEST or bool(_PART.fullmatch(name) or _TEMPORARY.fullmatch(name))


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The settings of the parts of a folder; None where they are absent or damaged."""
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # Each part knows its settings by its digest.
    return found if isinstance(found, dict) else None
