"""Files of vectors, one protein after the other: NumPy's ``.npz``, HDF5 or Parquet.

Ids are data, and never names of files. What a file holds is described at `open_arrays`.

Letters: N proteins, n residues of one, L layers (an axis only where several were asked for),
M width.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fast_attention.protein_lm.output_files import open_output
from fast_attention.protein_lm.tables import find_extension

EXTENSIONS = (".npz", ".h5", ".hdf5", ".parquet")
"""What the name of a file may end in, in lower case."""

Part = tuple[Sequence[str], Sequence[np.ndarray]]
"""Ids of some proteins, and an array of each."""


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


def write_arrays(path: str | os.PathLike[str], layout: Layout, parts: Iterable[Part]) -> None:
    """Writes vectors; no more than a part of them is in memory.

    ``.npz``: ``ids [N]``, ``layers [L]`` and, of whole proteins, ``embeddings [N, M]`` or
    ``[N, L, M]``; of residues, one array per protein, called ``0``, ``1``, ... in the order of
    ``ids``. ``.h5``, ``.hdf5``: the same ``ids`` and ``embeddings``, and the attribute ``layers``;
    of residues, ``embeddings`` is a group with a dataset per protein that is called by its id
    (``/`` and ``%`` in it are written ``%2F`` and ``%25``). ``.parquet``: a row per protein with
    ``id`` and ``embedding`` or, for several layers, ``embedding_<layer>``; of residues, a row per
    residue with ``id``, ``position`` (from 1) and the same.

    Args:
      path: The file, with one of `EXTENSIONS`, opened by `output_files.open_output`.
      layout: What the arrays are.
      parts: Proteins, in order.

    Raises:
      ValueError: At another extension.
      OutputError: If the file cannot be written.
    """
    write = {".npz": _write_npz, ".parquet": _write_parquet}
    extension = find_extension(path, EXTENSIONS)
    with open_output(path, seekable=True) as file:
        write.get(extension, _write_hdf5)(file, layout, parts)


def _shape(layout: Layout) -> tuple[int, ...]:
    layers = (len(layout.layers),) if layout.stacked else ()
    return (layout.proteins, *layers, layout.width)


def _write_npz(file: BinaryIO, layout: Layout, parts: Iterable[Part]) -> None:
    ids: list[str] = []
    with zipfile.ZipFile(file, "w") as archive:
        if layout.pooled:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(layout.dtype)),
                "fortran_order": False,
                "shape": _shape(layout),
            }
            with _member(archive, "embeddings") as member:
                np.lib.format.write_array_header_1_0(member, header)
                for names, arrays in parts:
                    ids += names
                    for array in arrays:
                        member.write(array.tobytes())
        else:
            for names, arrays in parts:
                for name, array in zip(names, arrays, strict=True):
                    _add_array(archive, str(len(ids)), array)
                    ids.append(name)
        _add_array(archive, "ids", np.array(ids))
        _add_array(archive, "layers", np.array(layout.layers))


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    # Without the time, equal arrays give equal bytes.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _add_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with _member(archive, name) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _write_hdf5(output: BinaryIO, layout: Layout, parts: Iterable[Part]) -> None:
    import h5py

    with h5py.File(output.name, "w") as file:
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
    name = name.replace("%", "%25").replace("/", "%2F")
    return name.replace(".", "%2E") if set(name) == {"."} else name


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
        yield pa.array(np.repeat(np.array(ids, object), counts), pa.string())
        if not layout.pooled:
            yield pa.array(np.concatenate([np.arange(1, n + 1) for n in counts]))
        for vectors in np.concatenate(rows, axis=1):
            yield pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), layout.width)

    with pq.ParquetWriter(file, schema) as writer:
        for ids, arrays in parts:
            writer.write_table(pa.Table.from_arrays([*columns(ids, arrays)], schema=schema))
