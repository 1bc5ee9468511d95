"""Span corruption: predict spans replaced by sentinels (T5, arXiv:1910.10683, section 3.1).

A sequence ``x1 .. xn EOS`` is read as one stream, ``x1 S0 x4 .. S1 .. xn EOS  S0 x2 x3 S1 .. Sk``:
the known residues, then the spans, each after its sentinel; the last sentinel ends the stream. The
loss is over the tokens after the second ``S0``. The attention is causal, so one decoder is enough
and a span is generated from a decoding state. A token of a span sees all known residues on both
sides.

Letters: n residues, k spans.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.packing import PackedRows
from fast_attention.protein_lm.modeling.continuing import continue_rows, log_probabilities
from fast_attention.protein_lm.modeling.drawing import Drawing
from fast_attention.protein_lm.modeling.encoding import Encoded, longest_input, with_end
from fast_attention.protein_lm.modeling.objectives.base import Batch, Gapped, Objective, Question


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """Spans with random places and lengths are masked; the defaults are those of T5.

    Attributes:
      noise_density: Share of the residues that are masked, at least one.
      mean_span_length: Average number of residues of a span.
      num_sentinels: Maximum number of spans of a sequence, plus one.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    num_sentinels: int = 100

    name = "span_corruption"
    causal = True

    def __post_init__(self):
        """Raises ValueError if an option is out of its range."""
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density must be above 0 and below 1; got {self.noise_density}")
        for name, least in (("mean_span_length", 1), ("num_sentinels", 2)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")

    def _sizes(self, residues: Any) -> tuple[Any, Any]:
        """Hidden residues and spans of sequences of so many residues."""
        noise = np.clip(np.rint(residues * self.noise_density), 1, residues).astype(int)
        most = np.minimum(np.minimum(noise, residues - noise + 1), self.num_sentinels - 1)
        return noise, np.clip(np.rint(noise / self.mean_span_length), 1, most).astype(int)

    def room(self, lengths: Any) -> Any:
        """Each span adds two sentinels."""
        return lengths + 2 * self._sizes(np.asarray(lengths))[1]

    def _prompt(self, known: Sequence[np.ndarray], tail: np.ndarray, alphabet: Alphabet) -> Any:
        """What is known with a sentinel for each span, the end, and the sentinel of the first."""
        sentinels = len(alphabet) + np.arange(len(known))[:, None]
        pieces = itertools.chain.from_iterable(zip(known, sentinels, strict=True))
        return np.concatenate([*list(pieces)[:-1], tail, sentinels[0]]).astype(np.int32)

    def _stream(self, tokens: np.ndarray, alphabet: Alphabet, draws: np.ndarray) -> Any:
        """The stream of a sequence, and where its second ``S0`` stands."""
        residues = int(alphabet.are_ordinary(tokens).sum())
        noise, count = map(int, self._sizes(residues))
        gaps = _compose(draws[1], residues - noise + 2, count + 1)
        gaps[0] -= 1  # The first and the last piece of what is known may be empty.
        gaps[-1] -= 1
        spans = np.append(_compose(draws[0], noise, count), 0) if count else [0]
        sizes = np.stack([gaps, spans], axis=1)
        pieces = np.split(tokens[:residues], np.cumsum(sizes.reshape(-1))[: 2 * count])
        prompt = self._prompt(pieces[::2], tokens[residues:], alphabet)
        closed = [np.append(x, len(alphabet) + i + 1) for i, x in enumerate(pieces[1::2])]
        return np.concatenate([prompt, *closed]), len(prompt) - 1

    def batch(self, rows: PackedRows, alphabet: Alphabet, draws: np.ndarray) -> Batch:
        """Corrupts every sequence of the rows, whose padding leaves the room for sentinels."""
        names = ("inputs", "targets", "weights", "segment_ids", "positions")
        batch = {name: np.zeros(rows.tokens.shape, np.int32) for name in names}
        batch["inputs"][:] = batch["targets"][:] = alphabet.filler
        for row, segments in enumerate(rows.segment_ids):
            begin = 0
            for segment in range(1, segments.max() + 1):
                own = segments == segment
                stream, spans = self._stream(rows.tokens[row, own], alphabet, draws[:, row, own])
                part = slice(begin, begin + len(stream) - 1)
                begin = part.stop
                batch["inputs"][row, part], batch["targets"][row, part] = stream[:-1], stream[1:]
                batch["weights"][row, part] = np.arange(len(stream) - 1) >= spans
                batch["segment_ids"][row, part] = segment
                batch["positions"][row, part] = np.arange(len(stream) - 1)
        return batch | {"weights": batch["weights"].astype(np.float32)}

    def questions(self, alphabet: Alphabet, item: Encoded) -> Iterator[Question]:
        """Each residue, as the first of a span that is hidden alone."""
        tail = with_end(alphabet, item)[len(item.residues) :]
        for place, token in enumerate(item.residues):
            known = (item.residues[:place], item.residues[place + 1 :])
            inputs = self._prompt(known, tail, alphabet)
            yield Question(inputs, np.array([token]), len(inputs) - 1)

    def describe(self, seeds: str) -> str:
        """The share and the lengths of spans."""
        share, length = 100 * self.noise_density, self.mean_span_length
        return f"{share:g} % of the residues are hidden, in spans of {length:g}, chosen by {seeds}"

    def check_spans(self, item: Gapped) -> None:
        """Raises ValueError if there are more spans than sentinels."""
        if len(item.bounds) >= self.num_sentinels:
            most = self.num_sentinels - 1
            raise ValueError(f"it has {len(item.bounds)} spans; the model has sentinels for {most}")

    def fill(
        self, model: Any, item: Gapped, keys: jax.Array, drawing: Drawing
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Writes one span after another; each ends with its sentinel, or at its most residues."""
        alphabet, most = model.domain.vocab, longest_input(model)
        tail = with_end(alphabet, Encoded(np.zeros(0, np.int32), whole=True))
        prompt = self._prompt(item.known, tail, alphabet)
        tokens = len(prompt) - 1 + sum(high + 1 for _, high in item.bounds)
        if most is not None and tokens > most:
            raise ValueError(f"{tokens} tokens are more than the {most} learned positions")
        rows, filled = [prompt] * len(keys), [[item.known[0]] for _ in keys]
        for span, bounds in enumerate(item.bounds):
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, span)
            closing = len(alphabet) + span + 1
            new = continue_rows(model, rows, now, drawing, bounds=bounds, closing=closing)
            for row, residues in enumerate(new):
                filled[row] += [residues, item.known[span + 1]]
                rows[row] = np.concatenate([rows[row], residues, [closing]])
        found = log_probabilities(model, rows)[:, len(prompt) - 1 :]
        written = [alphabet.are_ordinary(row[len(prompt) :]) for row in rows]
        total = [logs[: len(own)][own].sum() for logs, own in zip(found, written, strict=True)]
        return [np.concatenate(parts) for parts in filled], np.array(total)


def _compose(draws: np.ndarray, total: int, parts: int) -> np.ndarray:
    """A random way to write `total` as a sum of `parts` positive numbers."""
    cuts = np.sort(np.argsort(draws[: total - 1])[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)
