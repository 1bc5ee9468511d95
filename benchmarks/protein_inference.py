"""Scoring and embedding of many proteins: batches sorted by length against plain padding.

``python -m benchmarks.protein_inference`` scores and embeds proteins of the bundled corpus with an
untrained model of the demo's size (the numbers do not matter to the time) and prints a table:

* *sorted*: what ``protein-lm score`` and ``embed`` do, over all proteins;
* *longest of the file*: as many rows as fit into the same budget of tokens, in the order of the
  file, all as wide as the longest protein. All batches cost the same, so that some of them,
  spread over the file, tell the time of all;
* *longest of each batch*: 32 rows in the order of the file, each batch as wide as the longest
  protein in it, rounded up to the widths that *sorted* may use, as a program for each length would
  compile all day. Of these, too, some are timed.

Times are without compilation, which is told apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import make_protein_domain, read_fasta
from fast_attention.protein_lm.data.corpus import bundled_corpus
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.inference.embedding import embed_sequences
from fast_attention.protein_lm.inference.scoring import score_sequences
from fast_attention.protein_lm.modeling.encoding import row_lengths
from fast_attention.protein_lm.modeling.token_batches import (
    Shape,
    fill,
    plan_batches,
    windows,
)
from fast_attention.protein_lm.models import FlaxLM

SIZES: dict[str, dict[str, Any]] = {
    "demo": {"emb_dim": 128, "num_heads": 4, "num_layers": 4, "qkv_dim": 128, "mlp_dim": 512},
    "tiny": {"emb_dim": 32, "num_heads": 2, "num_layers": 1, "qkv_dim": 32, "mlp_dim": 64},
}
NAIVE_ROWS = 32

Batch = tuple[list[np.ndarray], Shape]


class Measured(NamedTuple):
    """One way to batch.

    Attributes:
      proteins: per second.
      padded: tokens computed per residue.
      programs: how many were compiled.
      compilation: seconds that took, the first run of each program included.
    """

    proteins: float
    padded: float
    programs: int
    compilation: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.protein_inference",
        description="Measures the scoring and embedding of many proteins.",
    )
    parser.add_argument("--proteins", type=int, default=5000, help="how many (5000)")
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the model (demo)")
    parser.add_argument("--tokens_per_batch", type=int, default=16384, help="the budget (16384)")
    parser.add_argument("--naive_batches", type=int, default=6, help="batches timed of each (6)")
    options = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    records = islice(read_fasta(bundled_corpus("train")), options.proteins)
    sequences = [record.sequence for record in records]
    lengths = np.array([len(sequence) for sequence in sequences])
    features = 64 if options.size == "demo" else 16
    model = FlaxLM(
        make_protein_domain(length=1024),
        attention_fn=make_fast_softmax_attention(nb_features=features),
        positions="rotary",
        shift_tokens=True,
        **SIZES[options.size],
    )
    print(
        f"{len(sequences)} proteins of {lengths.mean():.0f} residues on average, at most "
        f"{lengths.max()}; {options.size} model, {model.num_parameters:,} parameters; "
        f"{options.tokens_per_batch} tokens per batch; {jax.devices()[0].device_kind}\n"
    )
    print(f"{'':32s}  proteins/s  residues/s  tokens/residue  programs  compilation  speed-up")
    for task in ("score", "embed"):
        ours = _sorted(model, task, sequences, options.tokens_per_batch)
        _tell(f"{task}, sorted", ours, ours, lengths)
        for name, batches in (
            ("longest of the file", _whole(model, sequences, options.tokens_per_batch)),
            ("longest of each batch", _each(model, sequences)),
        ):
            found = _plain(model, task, list(batches), options.naive_batches, lengths)
            _tell(f"{task}, {name}", found, ours, lengths)


def _tell(name: str, found: Measured, ours: Measured, lengths: np.ndarray) -> None:
    print(
        f"{name:32s}{found.proteins:12.1f}{found.proteins * lengths.mean():12.0f}"
        f"{found.padded:16.2f}{found.programs:10d}{found.compilation:11.1f} s"
        f"{ours.proteins / found.proteins:9.1f}x",
        flush=True,
    )


def _sorted(model: FlaxModel, task: str, sequences: list[str], budget: int) -> Measured:
    run = score_sequences if task == "score" else embed_sequences
    times, shapes = [], set()
    for _ in range(2):
        shapes = set()
        began = time.perf_counter()
        for _ in run(model, sequences, tokens_per_batch=budget, shapes=shapes):
            pass
        times.append(time.perf_counter() - began)
    planned: set[Shape] = set()
    padded = sum(
        batch.rows * batch.width
        for window in windows([len(sequence) + 1 for sequence in sequences], int, budget)
        for batch in plan_batches(window, budget, planned)
    )
    assert planned == shapes
    residues = sum(map(len, sequences))
    return Measured(len(sequences) / times[1], padded / residues, len(shapes), times[0] - times[1])


def _encode(model: FlaxModel, sequences: list[str]) -> list[np.ndarray]:
    vocab = model.domain.vocab
    return [np.array([vocab.bos, *vocab.encode(sequence)], np.int32) for sequence in sequences]


def _whole(model: FlaxModel, sequences: list[str], budget: int) -> Iterator[Batch]:
    rows = _encode(model, sequences)
    width = max(map(len, rows))
    number = max(1, budget // width)
    for start in range(0, len(rows), number):
        yield rows[start : start + number], (number, width)


def _each(model: FlaxModel, sequences: list[str]) -> Iterator[Batch]:
    rows = _encode(model, sequences)
    for start in range(0, len(rows), NAIVE_ROWS):
        part = rows[start : start + NAIVE_ROWS]
        (widest,) = plan_batches([max(map(len, part))], 1, set())
        yield part, (NAIVE_ROWS, widest.width)


def _plain(
    model: FlaxModel, task: str, batches: list[Batch], number: int, lengths: np.ndarray
) -> Measured:
    chosen = np.unique(np.linspace(0, len(batches) - 1, number).round().astype(int))
    step = _scorer(model) if task == "score" else _embedder(model)
    times = []
    for _ in range(2):
        began = time.perf_counter()
        for place in chosen:
            jax.device_get(step(*batches[place]))
        times.append(time.perf_counter() - began)
    tokens = [rows * width for _, (rows, width) in batches]
    # Time goes with tokens: that of the chosen batches tells that of all.
    seconds = times[1] * sum(tokens) / sum(tokens[place] for place in chosen)
    return Measured(
        len(lengths) / seconds,
        sum(tokens) / float(lengths.sum()),
        len({shape for _, shape in batches}),
        times[0] - times[1],
    )


def _scorer(model: FlaxModel) -> Callable[[list[np.ndarray], Shape], jax.Array]:
    state = model.state

    def step(rows: list[np.ndarray], shape: Shape) -> jax.Array:
        return model.residue_step(
            state.parameters,
            state.variables,
            inputs=fill(rows, shape),
            targets=fill([row[1:] for row in rows], shape),
            lengths=row_lengths(rows, shape[0]),
        )

    return step


def _embedder(model: FlaxModel) -> Callable[[list[np.ndarray], Shape], jax.Array]:
    state = model.state

    def step(rows: list[np.ndarray], shape: Shape) -> jax.Array:
        lengths = row_lengths(rows, shape[0])
        return model.embedding_step(
            state.parameters,
            state.variables,
            inputs=fill(rows, shape),
            lengths=lengths,
            residues=np.maximum(lengths - 1, 0),
            layers=("last",),
            pool="mean",
            dtype="float32",
        )

    return step


if __name__ == "__main__":
    main()
