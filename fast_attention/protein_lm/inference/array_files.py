"""Files of vectors, one protein after the other: NumPy's ``.npz``, HDF5 or Parquet.

Ids are data, and never names of files. What a file holds is described at `open_arrays`.

Letters: N proteins, n residues of one, L layers (an axis only where several were asked for),
M width.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fast_attention.protein_lm.files.output_files import open_output
from fast_attention.protein_lm.files.tables import find_extension
from fast_attention.protein_lm.inference.partial_work import unpack_ids

EXTENSIONS = (".npz", ".h5", ".hdf5", ".parquet")
"""What the name of a file may end in, in lower case."""

Part = tuple[Sequence[str], Sequence[np.ndarray]]
"""Ids of some proteins, and an array of each."""

_IDS_BYTES = 2**28
"""Ids are one array of fixed width only where that takes no more memory."""

_ROWS_BYTES = 2**26
"""Text of ids that is written to a Parquet file at once."""

_LONGEST_LINK = 2**15
"""Bytes of the longest name that HDF5 gives to a dataset, with room for the rest of its header."""


class Layout(NamedTuple):
    """What all arrays of a file have in common.

    Attributes:
      proteins: N.
      layers: Names of the layers.
      pooled: Whether an array is of the whole protein, ``[M]``, or of its residues, ``[n, M]``.
      stacked: Whether arrays begin with an axis of layers.
      width: M.
      dtype: Of the numbers.
    """

    proteins: int
    layers: tuple[str, ...]
    pooled: bool
    stacked: bool
    width: int
    dtype: str


def write_arrays(
    path: str | os.PathLike[str],
    layout: Layout,
    parts: Iterable[Part],
    ids: Callable[[], Iterable[Sequence[str]]],
) -> None:
    """Writes vectors; no more than a part of them is in memory.

    ``.npz``: ``ids [N]``, ``layers [L]`` and, of whole proteins, ``embeddings [N, M]`` or
    ``[N, L, M]``; of residues, one array per protein, called ``0``, ``1``, ... in the order of
    ``ids``. Where an id is so long that ``ids``, whose strings all take the space of the longest,
    would need more than 256 MiB, the file has ``ids_utf8`` (uint8, all ids one after the other) and
    ``ids_ends [N]`` (where each ends) in its place; `read_ids` reads both.

    ``.h5``, ``.hdf5``: the same ``ids`` and ``embeddings``, and the attribute ``layers``; of
    residues, ``embeddings`` is a group with a dataset per protein that is called by its id (``/``
    and ``%`` in it are written ``%2F`` and ``%25``). ``.parquet``: a row per protein with ``id``
    and ``embedding`` or, for several layers, ``embedding_<layer>``; of residues, a row per residue
    with ``id``, ``position`` (from 1) and the same.

    Args:
      path: The file, with one of `EXTENSIONS`, opened by `output_files.open_output`.
      layout: What the arrays are.
      parts: Proteins, in order.
      ids: Gives the ids of the same parts; it is called several times.

    Raises:
      ValueError: At another extension, or an id that is too long for a dataset of HDF5.
      OutputError: If the file cannot be written.
    """
    extension = find_extension(path, EXTENSIONS)
    with open_output(path, seekable=True) as file:
        if extension == ".npz":
            _write_npz(file, layout, parts, ids)
        else:
            write = _write_parquet if extension == ".parquet" else _write_hdf5
            write(file, layout, parts)


def check_id(path: str | os.PathLike[str], pooled: bool, name: str) -> None:
    """Raises ValueError if a file cannot have a protein of this id; ask before the work."""
    if not pooled and find_extension(path, EXTENSIONS) in (".h5", ".hdf5"):
        _link(name)


def read_ids(path: str | os.PathLike[str]) -> list[str]:
    """Reads the ids of an ``.npz`` file that `write_arrays` wrote."""
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        return file["ids"].tolist() if "ids" in file.files else unpack_ids(file)


def _shape(layout: Layout) -> tuple[int, ...]:
    layers = (len(layout.layers),) if layout.stacked else ()
    return (layout.proteins, *layers, layout.width)


def _write_npz(
    file: BinaryIO,
    layout: Layout,
    parts: Iterable[Part],
    ids: Callable[[], Iterable[Sequence[str]]],
) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        if layout.pooled:
            with _member(archive, "embeddings") as member:
                _write_header(member, np.dtype(layout.dtype), _shape(layout))
                for _, arrays in parts:
                    for array in arrays:
                        member.write(array.tobytes())
        else:
            number = 0
            for _, arrays in parts:
                for array in arrays:
                    _add_array(archive, str(number), array)
                    number += 1
        _add_ids(archive, layout.proteins, ids)
        _add_array(archive, "layers", np.array(layout.layers))


def _add_ids(
    archive: zipfile.ZipFile, number: int, ids: Callable[[], Iterable[Sequence[str]]]
) -> None:
    width, size = 1, 0
    for names in ids():
        width = max(width, *map(len, names))
        size += sum(len(name.encode()) for name in names)
    if 4 * width * number <= _IDS_BYTES:
        with _member(archive, "ids") as member:
            kind = np.dtype(f"<U{width}")
            _write_header(member, kind, (number,))
            for names in ids():
                member.write(np.array(names, kind).tobytes())
        return
    with _member(archive, "ids_utf8") as member:
        _write_header(member, np.dtype(np.uint8), (size,))
        for names in ids():
            for name in names:
                member.write(name.encode())
    with _member(archive, "ids_ends") as member:
        _write_header(member, np.dtype(np.int64), (number,))
        end = 0
        for names in ids():
            ends = end + np.cumsum([len(name.encode()) for name in names], dtype=np.int64)
            member.write(ends.tobytes())
            end = int(ends[-1])


def _write_header(member: Any, kind: np.dtype, shape: tuple[int, ...]) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(kind),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(member, header)


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    # Without the time, equal arrays give equal bytes.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _add_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with _member(archive, name) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _write_hdf5(output: BinaryIO, layout: Layout, parts: Iterable[Part]) -> None:
    import h5py

    # The temporary file is locked already, see `temporaries`, and HDF5 would lock it once more.
    with h5py.File(output.name, "w", locking=False) as file:
        file.attrs["layers"] = layout.layers
        ids = file.create_dataset("ids", (layout.proteins,), h5py.string_dtype())
        if layout.pooled:
            whole = file.create_dataset("embeddings", _shape(layout), layout.dtype)
        else:
            group = file.create_group("embeddings")
        start = 0
        for names, arrays in parts:
            stop = start + len(names)
            ids[start:stop] = list(names)
            if layout.pooled:
                whole[start:stop] = np.stack(arrays)
            else:
                for name, array in zip(names, arrays, strict=True):
                    group.create_dataset(_link(name), data=array)
            start = stop


def _link(name: str) -> str:
    """An id as the name of an HDF5 object: a slash would part it, and "." is the group itself."""
    link = name.replace("%", "%25").replace("/", "%2F")
    if len(link.encode()) > _LONGEST_LINK:
        raise ValueError(
            f"the id that begins with {name[:100]!r} has {len(name):,} letters, too many for the "
            f"name of an HDF5 dataset (at most {_LONGEST_LINK:,} bytes): write to .npz or .parquet"
        )
    return link.replace(".", "%2E") if set(link) == {"."} else link


def _write_parquet(file: BinaryIO, layout: Layout, parts: Iterable[Part]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.from_numpy_dtype(np.dtype(layout.dtype)), layout.width)
    several = len(layout.layers) > 1
    names = [f"embedding_{layer}" if several else "embedding" for layer in layout.layers]
    keys = [("id", pa.string())] + ([] if layout.pooled else [("position", pa.int64())])
    schema = pa.schema([*keys, *((name, vector) for name in names)])

    def columns(ids: Sequence[str], arrays: Sequence[np.ndarray]) -> Iterator[pa.Array]:
        stacked = [array if layout.stacked else array[None] for array in arrays]
        # Rows of vectors: one for each protein, or for each of its residues.
        rows = [array.reshape(len(layout.layers), -1, layout.width) for array in stacked]
        counts = [array.shape[1] for array in rows]
        # Each id once: a row for each residue would repeat a long one many times.
        owners = pa.array(np.repeat(np.arange(len(ids), dtype=np.int32), counts))
        yield pa.DictionaryArray.from_arrays(owners, pa.array(ids, pa.string()))
        if not layout.pooled:
            yield pa.array(np.concatenate([np.arange(1, n + 1) for n in counts]))
        for vectors in np.concatenate(rows, axis=1):
            yield pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), layout.width)

    with pq.ParquetWriter(file, schema) as writer:
        for ids, arrays in parts:
            table = pa.Table.from_arrays([*columns(ids, arrays)], names=schema.names)
            step = max(1, _ROWS_BYTES // max(1, *(len(name.encode()) for name in ids)))
            for start in range(0, table.num_rows, step):
                writer.write_table(table.slice(start, step).cast(schema))
