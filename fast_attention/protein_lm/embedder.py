"""Vectors of proteins, as computed by the embedder of Google's protein_lm.

`FlaxModel.embed` uses the state after the model has read the residue. Here a causal model reads
``BOS x1 .. x(T-1)``, and vector t is the state from which it predicts token t (including the end
token and padding).

Shape letters: N sequences, T length, M width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.distributed import process_arrays
from fast_attention.protein_lm.modeling import train_state
from fast_attention.protein_lm.models import FlaxModel
from fast_attention.protein_lm.runs.stored_models import load_stored

ReduceFn = Callable[[Any, Any], Any]
EmbedFn = Callable[[Any], np.ndarray]


def get_embed_fn(
    model: FlaxModel | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    domain: DiscreteDomain | None = None,
    output_head: str = "output_emb",
    reduce_fn: ReduceFn | None = None,
    length: int | None = None,
) -> EmbedFn:
    """Returns a function from sequences to their vectors.

    Args:
      model: The model.
      checkpoint_dir: Instead of `model`, the folder of a run or of an exported model.
      domain: Domain for encoding strings, with the tokens of the model; None uses that of the
        model.
      output_head: ``"output_emb"`` (after the final norm, zero at padding), ``"input_emb"``,
        ``"layer_0"`` (after the first block), ``"layer_1"``, ..., or ``"logits"``.
      reduce_fn: Function of vectors [N, T, M] and tokens [N, T], such as `masked_reduce_fn`; None
        returns the vectors.
      length: Maximum number of tokens of a string; None is the domain's length.

    Returns:
      A function of strings, or of ids [N, T] with padding after the end token, computed as one
      batch. Strings are encoded with an end token, and padded to the length of the longest.

    Raises:
      ValueError: Unless exactly one of `model` and `checkpoint_dir` is given, if the model has no
        such output, or if the domain has other tokens than the model's.
    """
    found = _find_model(model, checkpoint_dir)
    domain = found.domain if domain is None else domain
    if domain.vocab.tokens != found.domain.vocab.tokens:
        raise ValueError("the domain has other tokens than the model: encode with model.domain")
    layer = _layer(output_head, found.config.num_layers)
    if length is not None and length < 1:
        raise ValueError(f"length must be at least 1, or None; got {length}")

    def embed(sequences: Any) -> np.ndarray:
        ids = _encode(sequences, domain, length)
        vectors = _logits(found, ids) if layer is None else _vectors(found, ids, layer)
        if output_head == "output_emb":
            vectors = vectors * _visible(found, ids)[..., None]
        return vectors if reduce_fn is None else np.asarray(reduce_fn(vectors, ids))

    return embed


class ProteinLMEmbedder:
    """Vectors of any number of sequences, in batches of one size; see `get_embed_fn`."""

    def __init__(
        self,
        model: FlaxModel | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        domain: DiscreteDomain | None = None,
        output_head: str = "output_emb",
        reduce_fn: ReduceFn | None = None,
        length: int | None = None,
        batch_size: int = 64,
    ):
        """Takes the arguments of `get_embed_fn`, and the number of rows of a batch.

        Raises:
          ValueError: As `get_embed_fn`, or if `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        model = _find_model(model, checkpoint_dir)
        self._embed = get_embed_fn(model, None, domain, output_head, reduce_fn, length)
        self._domain = model.domain if domain is None else domain
        self._length = length
        self._batch_size = batch_size

    def __call__(self, sequences: Any) -> np.ndarray:
        """The vectors of some strings, or of ids [N, T].

        Returns:
          [N, T, M], or the result of ``reduce_fn`` for N sequences.

        Raises:
          ValueError: If there is no sequence, or one is not in the domain.
        """
        ids = _encode(sequences, self._domain, self._length)
        results = []
        for first in range(0, len(ids), self._batch_size):
            rows = ids[first : first + self._batch_size]
            missing = self._batch_size - len(rows)
            # All batches have one shape, so that the model is compiled once.
            padded = np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)])
            results.append(self._embed(padded)[: len(rows)])
        return np.concatenate(results)


def _find_model(
    model: FlaxModel | None, checkpoint_dir: str | os.PathLike[str] | None
) -> FlaxModel:
    if model is not None and checkpoint_dir is None:
        return model
    if model is not None or checkpoint_dir is None:
        raise ValueError("expected exactly one of model and checkpoint_dir")
    return load_stored(checkpoint_dir).model


def _layer(output_head: str, num_layers: int) -> int | str | None:
    heads: dict[str, int | str | None] = {"output_emb": "last", "input_emb": 0, "logits": None}
    heads |= {f"layer_{number}": number + 1 for number in range(num_layers)}
    if output_head not in heads:
        hint = ""
        if output_head == "regression":
            hint = "; regression heads are trained by 'protein-lm fine-tune'"
        raise ValueError(
            f"output_head must be one of {', '.join(heads)}; got {output_head!r}{hint}"
        )
    return heads[output_head]


def _encode(sequences: Any, domain: DiscreteDomain, length: int | None) -> np.ndarray:
    """int32 [N, T]."""
    if isinstance(sequences, str):
        raise ValueError("expected several sequences, but got one string: give [sequence]")
    if not len(sequences):
        raise ValueError("no sequence was given")
    if isinstance(sequences[0], str):
        return _encode_strings(sequences, domain, length)
    ids = np.asarray(sequences)
    if (
        ids.ndim != 2
        or not 1 <= ids.shape[1] <= domain.length
        or not domain.vocab.are_valid(ids).all()
    ):
        raise ValueError(
            "the int-encoded sequences are not in the domain: expected ids [N, T] from 0 "
            f"to {domain.vocab_size - 1}, of at most {domain.length} tokens; got {ids.shape}"
        )
    return ids.astype(np.int32)


def _encode_strings(
    sequences: Sequence[str], domain: DiscreteDomain, length: int | None
) -> np.ndarray:
    vocab = domain.vocab
    width = min(max(map(len, sequences)), domain.length if length is None else length)
    if width < 1:
        raise ValueError("every sequence is empty")
    end = [] if vocab.eos is None else [vocab.eos]
    ids = np.full((len(sequences), width), vocab.filler, np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        tokens = [*vocab.encode(sequence), *end][:width]
        row[: len(tokens)] = tokens
    return ids


def _inputs(model: FlaxModel, ids: np.ndarray) -> np.ndarray:
    """Input of the model; for a causal model, the tokens shifted by one."""
    if not model.objective.begins:
        return ids
    return np.concatenate([np.full((len(ids), 1), model.bos_token), ids[:, :-1]], axis=1)


def _visible(model: FlaxModel, ids: np.ndarray) -> np.ndarray:
    """Bool [N, T]: where the model reads no padding."""
    inputs = _inputs(model, ids)
    return np.ones(inputs.shape, bool) if model.pad_token is None else inputs != model.pad_token


def _batch(model: FlaxModel, ids: np.ndarray) -> dict[str, jax.Array]:
    visible = _visible(model, ids)
    batch = {
        "inputs": _inputs(model, ids).astype(np.int32),
        "segment_ids": visible.astype(np.int32),
        "positions": np.where(visible, np.arange(ids.shape[1]), 0).astype(np.int32),
    }
    return train_state.shard_batch(batch, model.mesh)


def _logits(model: FlaxModel, ids: np.ndarray) -> np.ndarray:
    logits = model.logits_step(model.weights, model.variables, _batch(model, ids), packed=False)
    return process_arrays.fetch(logits)


def _vectors(model: FlaxModel, ids: np.ndarray, layer: int | str) -> np.ndarray:
    visible = _visible(model, ids)
    # Padding stands behind the last token that is none.
    lengths = ids.shape[1] - np.argmax(visible[:, ::-1], axis=1)
    batch = {
        "inputs": _inputs(model, ids).astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "residues": lengths.astype(np.int32),
    }
    vectors = model.embedding_step(
        model.weights,
        model.variables,
        **train_state.shard_batch(batch, model.mesh),
        layers=(layer,),
        pool=None,
        dtype="float32",
    )
    return process_arrays.fetch(vectors)[0]
