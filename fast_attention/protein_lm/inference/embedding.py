"""Vectors that represent proteins, or each of their residues.

A causal model reads ``BOS x1 .. xn``: the vector of residue t is the state after reading it, and
knows of nothing behind it. A masked model reads ``x1 .. xn EOS``: the vector of a residue knows
the whole protein. What a protein shares a batch with does not change its vectors.

Letters: n residues of a protein, L layers, M width, B batch, T length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fast_attention.protein_lm.modeling import token_batches, train_state
from fast_attention.protein_lm.modeling.encoding import Encoded, encode_sequences, row_lengths
from fast_attention.protein_lm.modeling.inference_steps import Layer
from fast_attention.protein_lm.ranges import check_choice

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel


POOL = "mean"
POOLS = ("mean", "max", "sum", "bos", "eos")
DTYPES = ("float32", "float16")

_WINDOW_BYTES = 2**28
"""Vectors that a window may hold, as it is given out in the order of the input."""


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """What is taken as the vector of a protein.

    Attributes:
      layers: "last" is the output of the final norm; 0 the embedding of the tokens, i the
        stream after block i, -1 that after the last block, and so on.
      pool: "mean", "max" or "sum" over the residues, without begin, end and padding tokens;
        "bos" or "eos" takes the state at that token. A causal model reads no end token: "eos"
        is the state after its last residue, from which it would predict the end; "bos" is the
        same for all proteins, for nothing was read yet. A masked model reads no begin token. None
        keeps the vector of every residue.
      dtype: "float32", or "float16" for half the space.
      tokens_per_batch: Most tokens of a batch, padding included; less needs less memory. A longer
        protein has a batch of its own.
      max_length: Crops proteins to so many residues; None takes them whole.
    """

    layers: Layer | tuple[Layer, ...] = "last"
    pool: str | None = POOL
    dtype: str = "float32"
    tokens_per_batch: int = token_batches.TOKENS_PER_BATCH
    max_length: int | None = None

    def __post_init__(self):
        """Checks what does not depend on the model.

        Raises:
          ValueError: At a value that is none of those above.
        """
        if isinstance(self.layers, (list, range)):
            object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.chosen:
            if layer != "last" and (isinstance(layer, bool) or not isinstance(layer, int)):
                raise ValueError(f"a layer is a number or 'last', but got {layer!r}.")
        if not self.chosen:
            raise ValueError("expected at least one layer, but got none.")
        if self.pool is not None and self.pool not in POOLS:
            raise ValueError(
                f"pool must be one of {', '.join(POOLS)}, or None for the vectors of all "
                f"residues, but got {self.pool!r}."
            )
        check_choice("dtype", self.dtype, DTYPES)

    @property
    def chosen(self) -> tuple[Layer, ...]:
        """The layers, also where a single one was given."""
        return self.layers if isinstance(self.layers, tuple) else (self.layers,)


def embed_sequences(
    model: BuiltModel,
    sequences: Iterable[str],
    *,
    shapes: set[token_batches.Shape] | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Embeds proteins, in their order.

    Args:
      model: The model.
      sequences: Residues, in upper case; read as they are needed.
      shapes: Gathers the shapes of batches, one for each program compiled.
      progress: Called with the number of residues embedded since its last call.
      **options: Fields of `EmbeddingConfig`: ``layers``, ``pool``, ``dtype``,
        ``tokens_per_batch``, ``max_length``.

    Yields:
      ``[M]`` for each protein, or ``[n, M]`` with ``pool=None``; with a tuple of layers there is
      an axis of them in front, ``[L, M]`` or ``[L, n, M]``.

    Raises:
      ValueError: At an option that the model does not have, or a sequence that is empty, has a
        letter that the model does not know, or more residues than it has learned positions.
    """
    config = EmbeddingConfig(**options)
    check_config(model, config)
    encoded = encode_sequences(model, sequences, max_length=config.max_length)
    shapes = set() if shapes is None else shapes
    windows = token_batches.windows(
        encoded,
        num_tokens,
        config.tokens_per_batch,
        window_batches(model, config),
        window_proteins(model, config),
    )
    return (
        vectors
        for window in windows
        for vectors in embed_window(model, window, config, shapes, progress)
    )


def check_config(model: BuiltModel, config: EmbeddingConfig) -> None:
    """Raises ValueError if a model cannot give what the options name."""
    blocks = model.config.num_layers
    for layer in config.chosen:
        if layer != "last" and not -blocks - 1 <= layer <= blocks:
            raise ValueError(
                f"the model has the layers 0 (the embedding of the tokens) .. {blocks}, or "
                f"{-blocks - 1} .. -1 counted from the end, and 'last'; got {layer}."
            )
    objective = model.objective
    ends = not objective.begins
    no_begin = config.pool == "bos" and not objective.enclose
    if ends and (no_begin or config.pool == "eos" and model.domain.vocab.eos is None):
        raise ValueError(
            f"pool={config.pool!r}: {type(model).__name__} reads no such token; take 'mean', 'max' "
            "or 'sum'."
        )


def layer_names(model: BuiltModel, config: EmbeddingConfig) -> tuple[str, ...]:
    """The layers that are meant, counted from the first: ``last``, ``0``, ``1``, ..."""
    blocks = model.config.num_layers
    return tuple(
        str(layer + blocks + 1 if isinstance(layer, int) and layer < 0 else layer)
        for layer in config.chosen
    )


def num_tokens(item: Encoded) -> int:
    """Tokens that a model reads of a protein, its begin or end token included."""
    return len(item.residues) + 1


def window_batches(model: BuiltModel, config: EmbeddingConfig) -> int:
    """How many batches fit into a window, for `token_batches.windows`."""
    if config.pool is not None:
        return token_batches.WINDOW
    vector = 4 * model.config.emb_dim * len(config.chosen)
    fitting = _WINDOW_BYTES // (vector * config.tokens_per_batch)
    return max(1, min(fitting, token_batches.WINDOW))


def window_proteins(model: BuiltModel, config: EmbeddingConfig) -> int:
    """How many proteins a window has at most, for `token_batches.windows`."""
    return max(1, _WINDOW_BYTES // (4 * model.config.emb_dim * len(config.chosen)))


def embed_window(
    model: BuiltModel,
    window: list[Encoded],
    config: EmbeddingConfig,
    shapes: set[token_batches.Shape],
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Embeds the proteins of one window of `token_batches.windows`.

    Args:
      model: As for `embed_sequences`.
      window: Proteins.
      config: The options.
      shapes: Of programs that exist; those used are added.
      progress: As for `embed_sequences`.

    Returns:
      An array for each protein, as `embed_sequences` gives.
    """
    objective = model.objective

    def compute(items: list[Encoded], shape: token_batches.Shape) -> jax.Array:
        rows = [objective.read(model.domain.vocab, item) for item in items]
        residues = row_lengths([item.residues for item in items], shape[0])
        batch = {
            "inputs": token_batches.fill(rows, shape),
            "lengths": row_lengths(rows, shape[0]),
            "residues": residues,
        }
        return model.embedding_step(
            model.weights,
            model.variables,
            **train_state.shard_batch(batch, model.mesh),
            layers=config.chosen,
            pool=config.pool,
            dtype=config.dtype,
        )

    def take(found: np.ndarray, row: int, item: Encoded) -> np.ndarray:
        if config.pool == "eos" and not objective.begins and not item.whole:
            raise ValueError(
                f"pool='eos': a protein cropped to max_length={config.max_length} residues has no "
                "end token; take 'mean', 'max' or 'sum', or embed it whole."
            )
        vectors = found[:, row]
        if config.pool is None:
            vectors = vectors[:, objective.first : objective.first + len(item.residues)]
        if not np.isfinite(vectors).all():
            raise FloatingPointError(
                "a vector is not finite"
                + (": float16 ends at 65504, take float32." if config.dtype == "float16" else ".")
            )
        # A copy: a view would keep the results of the whole batch in memory.
        return (vectors if isinstance(config.layers, tuple) else vectors[0]).copy()

    def report(items: list[Encoded]) -> None:
        if progress is not None:
            progress(sum(len(item.residues) for item in items))

    return token_batches.compute_window(
        window,
        num_tokens,
        compute,
        take,
        config.tokens_per_batch,
        shapes,
        devices=model.mesh.size,
        progress=report,
    )


def pass_window(
    model: BuiltModel,
    window: list[Encoded],
    config: EmbeddingConfig,
    shapes: set[token_batches.Shape],
) -> None:
    """Adds the shapes that `embed_window` would, so that what follows is computed as after it."""
    token_batches.plan_batches(
        [num_tokens(item) for item in window],
        config.tokens_per_batch,
        shapes,
        devices=model.mesh.size,
    )
