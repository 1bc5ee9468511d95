"""Vectors of the proteins of FASTA files, in a file, by work that can be stopped and goes on.

Proteins are embedded window by window. What is done lies in parts in a folder beside the output,
``<output>.partial``, until the last window; then the output is put together of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.protein_lm import embedding, token_batches
from fast_attention.protein_lm.array_files import EXTENSIONS, Layout, Part, write_arrays
from fast_attention.protein_lm.embedding import EmbeddingConfig
from fast_attention.protein_lm.encoding import Encoded, encode_sequences
from fast_attention.protein_lm.fasta import FastaRecord
from fast_attention.protein_lm.model_inputs import Done
from fast_attention.protein_lm.output_files import (
    check_output,
    is_special,
    open_output,
    write_json,
)
from fast_attention.protein_lm.run_folder import RunError
from fast_attention.protein_lm.tables import find_extension

if TYPE_CHECKING:
    from fast_attention.protein_lm.flax_model import FlaxModel

_MANIFEST = "manifest.json"


def embed_to_file(
    model: FlaxModel,
    records: Iterable[FastaRecord],
    output: str | os.PathLike[str],
    config: EmbeddingConfig | None = None,
    *,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Done:
    """Embeds proteins and writes their vectors, in their order.

    Stopped, whenever that is, the same call goes on where it was, and gives the file that it would
    have given at once. What was done of a protein is used again as long as its window is the same:
    proteins may be added at the end, or one that stopped the work corrected.

    Args:
      model: A `FlaxLM` or a `FlaxBERT`.
      records: Proteins; read as they are needed.
      output: The file, see `array_files.write_arrays`.
      config: What is taken as the vector of a protein.
      origin: Whatever else must not change before the work is done, as JSON; for instance the
        model's training step.
      progress: Called with the number of residues embedded since its last call.

    Raises:
      RunError: If a call with another model or other arguments was stopped, or there is no protein.
      ValueError: As `embed_sequences`; at another extension; at ids that are not unique.
      OutputError: If the output cannot be written.
    """
    config = config or EmbeddingConfig()
    output = Path(output)
    find_extension(output, EXTENSIONS)
    check_output(output)
    embedding.check_config(model, config)
    with contextlib.ExitStack() as stack:
        if is_special(output):
            # Nothing lies beside a pipe, and nobody resumes it.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="protein-lm.")))
        else:
            whole = Path(os.path.realpath(output))
            folder = whole.with_name(f"{whole.name}.partial")
        _claim(folder, _manifest(model, config, origin or {}))
        return _embed(model, records, output, config, folder, progress)


def _embed(
    model: FlaxModel,
    records: Iterable[FastaRecord],
    output: Path,
    config: EmbeddingConfig,
    folder: Path,
    progress: Callable[[int], None] | None,
) -> Done:
    """Writes parts to `folder`, or takes those that are there, and puts the output together."""
    shapes: set[token_batches.Shape] = set()
    parts: list[Path] = []
    proteins = residues = longer = computed = 0
    size = embedding.window_batches(model, config)
    for window in token_batches.windows(
        _encode(model, records, config), _num_tokens, config.tokens_per_batch, size
    ):
        ids, items = [name for name, _ in window], [item for _, item in window]
        parts.append(folder / f"{len(parts):06}.npz")
        found = sum(len(item.residues) for item in items)
        digest = _digest(window)
        if _holds(parts[-1], digest):
            embedding.pass_window(model, items, config, shapes)
        else:
            vectors = embedding.embed_window(model, items, config, shapes, progress)
            _save(parts[-1], digest, ids, vectors, config)
            computed += found
        proteins += len(items)
        residues += found
        longer += sum(len(item.residues) > model.domain.length for item in items)
    if not parts:
        raise RunError("there is no protein to embed")
    layout = Layout(
        proteins,
        embedding.layer_names(model, config),
        pooled=config.pool is not None,
        stacked=isinstance(config.layers, tuple),
        width=model.config.emb_dim,
        dtype=config.dtype,
    )
    write_arrays(output, layout, (_load(path, config) for path in parts))
    shutil.rmtree(folder, ignore_errors=True)
    return Done(proteins, residues, longer, computed)


def _num_tokens(pair: tuple[str, Encoded]) -> int:
    return embedding.num_tokens(pair[1])


def _encode(
    model: FlaxModel, records: Iterable[FastaRecord], config: EmbeddingConfig
) -> Iterator[tuple[str, Encoded]]:
    seen: set[int] = set()
    room = embedding.room(model)
    for record in records:
        key = hash(record.id)
        if key in seen:
            raise ValueError(
                f"two proteins have the id {record.id!r}, and their vectors could not be told "
                "apart: give each an id of its own"
            )
        seen.add(key)
        (encoded,) = encode_sequences(
            model, [record.sequence], room=room, max_length=config.max_length
        )
        yield record.id, encoded


def _manifest(
    model: FlaxModel, config: EmbeddingConfig, origin: Mapping[str, Any]
) -> dict[str, Any]:
    layers = embedding.layer_names(model, config)
    found = {
        "model": _fingerprint(model),
        "layers": list(layers) if isinstance(config.layers, tuple) else layers[0],
        "pool": config.pool,
        "dtype": config.dtype,
        "tokens_per_batch": config.tokens_per_batch,
        "max_length": config.max_length,
        "devices": model.mesh.size,
        **origin,
    }
    return json.loads(json.dumps(found))


def _fingerprint(model: FlaxModel) -> str:
    """The SHA-256 of all arrays of a model, and of its shape."""
    digest = hashlib.sha256(f"{model.objective} {model.config}".encode())
    for leaf in jax.tree.leaves((model.weights, model.state.variables)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder of parts, or checks that those in it belong to the same work."""
    path = folder / _MANIFEST
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{name}: {before.get(name)!r} there, {manifest.get(name)!r} asked for now"
            for name in sorted({*before, *manifest})
            if before.get(name) != manifest.get(name)
        ]
        if changed:
            raise RunError(
                f"{folder} holds the work of a command that was stopped, with other settings:\n  "
                + "\n  ".join(changed)
                + "\ngive the settings of that command to go on with it, delete the folder to "
                "begin anew, or give another output"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise RunError(
            f"{folder} is in the way, and does not hold the work of a command that was stopped: "
            "move it, or give another output"
        )
    folder.mkdir(exist_ok=True)
    write_json(path, manifest)


def _digest(window: list[tuple[str, Encoded]]) -> str:
    """The SHA-256 of what a window holds."""
    digest = hashlib.sha256()
    for name, item in window:
        digest.update(f"{name}\0{len(item.residues)} {item.whole}\0".encode())
        digest.update(item.residues.tobytes())
    return digest.hexdigest()


def _holds(path: Path, digest: str) -> bool:
    """Whether a file holds the part of a window, whole."""
    try:
        with np.load(path) as part:
            return part["digest"].item() == digest
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False  # It is not there yet, or damaged, and computed again.


def _save(
    path: Path, digest: str, ids: list[str], arrays: list[np.ndarray], config: EmbeddingConfig
) -> None:
    pooled = config.pool is not None
    with open_output(path, seekable=True) as file:
        np.savez(
            file,
            allow_pickle=False,
            digest=np.array(digest),
            ids=np.array(ids),
            sizes=np.array([1 if pooled else array.shape[-2] for array in arrays]),
            values=np.stack(arrays) if pooled else np.concatenate(arrays, axis=-2),
        )


def _load(path: Path, config: EmbeddingConfig) -> Part:
    with np.load(path) as part:
        values, sizes, ids = part["values"], part["sizes"], part["ids"].tolist()
    if config.pool is not None:
        return ids, list(values)
    return ids, np.split(values, np.cumsum(sizes)[:-1], axis=-2)
