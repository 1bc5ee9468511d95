"""Vectors of the proteins of FASTA files, in a file, by a command that can be resumed.

Proteins are embedded window by window. Finished parts are in a folder beside the output,
see `partial_work`, until the last window; then the output is put together of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_files import check_output
from fast_attention.protein_lm.files.tables import find_extension
from fast_attention.protein_lm.inference import embedding, partial_work
from fast_attention.protein_lm.inference.array_files import (
    EXTENSIONS,
    Layout,
    Part,
    check_id,
    write_arrays,
)
from fast_attention.protein_lm.inference.embedding import EmbeddingConfig
from fast_attention.protein_lm.inference.model_inputs import record_cost
from fast_attention.protein_lm.inference.partial_work import Arrays, Done, Protein
from fast_attention.protein_lm.modeling import token_batches
from fast_attention.protein_lm.modeling.encoding import Encoded

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

_IDS = ("ids_utf8", "ids_ends")


def embed_to_file(
    model: BuiltModel,
    records: Iterable[FastaRecord],
    output: str | os.PathLike[str],
    config: EmbeddingConfig | None = None,
    *,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Done:
    """Embeds proteins and writes their vectors, in their order.

    If it is interrupted, the same call resumes, and gives the file that it would
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
    with partial_work.open_work(output, _settings(model, config, origin or {})) as work:
        return _embed(model, _unique(records, config, output), output, config, work, progress)


def _embed(
    model: BuiltModel,
    records: Iterable[FastaRecord],
    output: Path,
    config: EmbeddingConfig,
    work: partial_work.Work,
    progress: Callable[[int], None] | None,
) -> Done:
    """Computes the parts that are missing, and puts the output together."""
    shapes: set[token_batches.Shape] = set()

    def compute(window: list[Protein]) -> Arrays:
        ids, items = [protein.id for protein in window], [protein.encoded for protein in window]
        return _pack(ids, embedding.embed_window(model, items, config, shapes, progress), config)

    def pass_over(items: list[Encoded]) -> None:
        embedding.pass_window(model, items, config, shapes)

    windows = token_batches.windows(
        partial_work.encode_records(model, records, config.max_length),
        _cost,
        config.tokens_per_batch,
        embedding.window_batches(model, config),
        embedding.window_proteins(model, config),
    )
    digests: list[str] = []
    done = Done()
    for part in partial_work.complete_parts(model, work, windows, compute, pass_over):
        digests.append(part.digest)
        done = part.done
    if not digests:
        raise RunError("there is no protein to embed")
    layout = Layout(
        done.proteins,
        embedding.layer_names(model, config),
        pooled=config.pool is not None,
        stacked=isinstance(config.layers, tuple),
        width=model.config.emb_dim,
        dtype=config.dtype,
    )

    def stored(*names: str) -> Iterator[Arrays]:
        for number, digest in enumerate(digests):
            yield partial_work.read_part(work, number, digest, names)

    write_arrays(
        output,
        layout,
        (_unpack(part, config) for part in stored(*_IDS, "sizes", "values")),
        lambda: map(partial_work.unpack_ids, stored(*_IDS)),
    )
    partial_work.remove_parts(work)
    return done


def _cost(protein: Protein) -> int:
    return max(embedding.num_tokens(protein.encoded), record_cost(protein.id))


def _unique(
    records: Iterable[FastaRecord], config: EmbeddingConfig, output: Path
) -> Iterator[FastaRecord]:
    """Yields records, whose ids are checked to be fit for the output and to differ."""
    seen: set[int] = set()
    for record in records:
        key = hash(record.id)
        if key in seen:
            raise ValueError(
                f"two proteins have the id {record.id!r}, and their vectors could not be told "
                "apart: give each an id of its own"
            )
        seen.add(key)
        check_id(output, config.pool is not None, record.id)
        yield record


def _settings(
    model: BuiltModel, config: EmbeddingConfig, origin: Mapping[str, Any]
) -> dict[str, Any]:
    layers = embedding.layer_names(model, config)
    own = {
        "layers": list(layers) if isinstance(config.layers, tuple) else layers[0],
        "pool": config.pool,
        "dtype": config.dtype,
    }
    return partial_work.settings(
        "embed", model, config.tokens_per_batch, config.max_length, own | dict(origin)
    )


def _pack(ids: Sequence[str], arrays: Sequence[np.ndarray], config: EmbeddingConfig) -> Arrays:
    pooled = config.pool is not None
    return partial_work.pack_ids(ids) | {
        "sizes": np.array([1 if pooled else array.shape[-2] for array in arrays]),
        "values": np.stack(arrays) if pooled else np.concatenate(arrays, axis=-2),
    }


def _unpack(part: Arrays, config: EmbeddingConfig) -> Part:
    ids, values = partial_work.unpack_ids(part), part["values"]
    if config.pool is not None:
        return ids, list(values)
    return ids, np.split(values, np.cumsum(part["sizes"])[:-1], axis=-2)
