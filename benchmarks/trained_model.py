"""What linear attention does to a model that was trained with exact attention.

``python -m benchmarks.trained_model --model=FOLDER`` loads a published BERT or ESM-2 model, puts
other attention functions in the place of its exact attention, trains nothing, and measures how many
masked residues each predicts and with what perplexity. AntiBERTy (MIT licence, 26 million
parameters) is in a wheel of PyPI::

    pip download --no-deps antiberty==0.1.3
    unzip antiberty-0.1.3-py3-none-any.whl 'antiberty/trained_models/*'
    python -m benchmarks.trained_model --model=antiberty/trained_models/AntiBERTy_md_smooth

The default sequences are germline antibodies (``tests/data/antibodies``). The figures are written
after every measurement, and the same command resumes an interrupted run. A table and a picture
come last. Draws are measured one after another: ``--draws=3`` adds two to those of ``--draws=1``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.trained_model_figure import Row, draw_picture, make_table
from fast_attention import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
    make_local_attention,
    make_softmax_attention,
)
from fast_attention.layers import Stack, with_attention
from fast_attention.models import load_pretrained

FASTA = Path(__file__).parents[1] / "tests" / "data" / "antibodies" / "heavy.fasta.gz"
FOLDER = Path("runs/trained-model")
NUMBERS, PICTURE = "trained-model.json", "trained-model.png"
BATCH = 16
MASKED = 0.15

ESTIMATORS = ("favor+", "wderf_s", "hedgehog", "sderf", "darkformer")
"""Features of "hedgehog" and "darkformer" are learned, but nothing is trained here."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention function.

    Attributes:
      name: As printed.
      features: M, or None.
      window: ``exact_window``, or None.
      make: Makes it.
      random: Whether draws differ.
    """

    name: str
    features: int | None
    window: int | None
    make: Callable[[], Any]
    random: bool = True


def cases(
    features: Sequence[int], windows: Sequence[int], estimators: Sequence[str] = ESTIMATORS
) -> list[Case]:
    """Exact and uniform attention, windows alone, and estimators at each number of features."""
    uniform = functools.partial(
        make_fast_generalized_attention,
        kernel_fn=jnp.zeros_like,
        kernel_epsilon=1.0,
        nb_features=8,
        features_type="deterministic",
    )
    found = [
        Case("exact", None, None, make_softmax_attention, False),
        Case("uniform", None, None, uniform, False),
    ]
    for window in windows:
        alone = functools.partial(make_local_attention, window, exact_window=True)
        found.append(Case("window alone", None, window, alone, False))
    relu = functools.partial(make_fast_generalized_attention, features_type="ortho")
    found += [
        Case("ReLU", number, None, functools.partial(relu, nb_features=number))
        for number in features
    ]
    for window in (None, *windows):
        for estimator in estimators:
            for number in features:
                make = functools.partial(
                    make_fast_softmax_attention,
                    nb_features=number,
                    estimator=estimator,
                    exact_window=window,
                    redraw_features=False,
                )
                found.append(Case(estimator, number, window, make))
    return found


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Ids by token, from ``vocab.txt`` in the folder of the model or the one above."""
    for place in (folder, folder.parent):
        if (place / "vocab.txt").is_file():
            tokens = (place / "vocab.txt").read_text(encoding="utf-8").split()
            return {token: index for index, token in enumerate(tokens)}
    raise SystemExit(f"{folder} has no vocab.txt, nor has the folder above it")


def read_sequences(path: Path, limit: int) -> list[str]:
    """The first sequences of a FASTA file, perhaps compressed."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        records = file.read().split(">")[1:]
    found = ["".join(record.splitlines()[1:]) for record in records[:limit]]
    if not found:
        raise SystemExit(f"{path} has no sequences")
    return found


def masked_batches(
    sequences: Sequence[str], ids: dict[str, int], rate: float, seed: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of masked tokens, true tokens and what was masked; padding is -1 in the second."""
    begin, end = ("[CLS]", "[SEP]") if "[CLS]" in ids else ("<cls>", "<eos>")
    mask = ids["[MASK]" if "[MASK]" in ids else "<mask>"]
    rng = np.random.default_rng(seed)
    length = max(map(len, sequences)) + 2
    rows = np.full((len(sequences), length), -1)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence) + 2] = [ids[begin], *map(ids.__getitem__, sequence), ids[end]]
    residue = (rows >= 0) & (np.arange(length) > 0)
    residue &= np.roll(rows, -1, axis=1) >= 0
    residue[:, -1] = False
    hidden = residue & (rng.random(rows.shape) < rate)
    given = np.where(hidden, mask, np.maximum(rows, 0))
    parts = range(0, len(rows), BATCH)
    return [(given[i : i + BATCH], rows[i : i + BATCH], hidden[i : i + BATCH]) for i in parts]


class _Separate(nnx.Module):
    """A sublayer of a stack as a program of its own."""

    def __init__(self, sublayer: Any):
        self.sublayer = sublayer

    def __call__(self, x: Any, inputs: Any, **_: Any) -> tuple[Any, None]:
        return _apply(*nnx.split(self.sublayer), x, inputs), None

    def leave(self, x: Any) -> Any:
        return self.sublayer.leave(x)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: Any, state: Any, x: Any, inputs: Any) -> Any:
    return nnx.merge(graph, state)(x, inputs, deterministic=True, rngs=None)[0]


@jax.jit
def _sums(logits: Any, true: Any, hidden: Any) -> Any:
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_probabilities, jnp.maximum(true, 0)[..., None], -1)[..., 0]
    right = (logits.argmax(-1) == true) & hidden
    return right.sum(), jnp.where(hidden, own, 0).sum(), hidden.sum()


def measure(model: nnx.Module, batches: Iterable[Any]) -> tuple[float, float]:
    """Share of masked residues predicted, and the perplexity of them.

    Equal layers are compiled once: one program of a whole model takes minutes to compile.
    """
    model = nnx.clone(model)
    for _, stack in nnx.iter_modules(model):
        if isinstance(stack, Stack):
            blocks = [nnx.List([_Separate(part) for part in block]) for block in stack.blocks]
            stack.blocks = nnx.List(blocks)
    found = []
    for given, true, hidden in batches:
        logits = model(jnp.asarray(given), key_mask=jnp.asarray(true >= 0))  # pyright: ignore[reportCallIssue]
        found.append(jax.device_get(_sums(logits, jnp.asarray(true), jnp.asarray(hidden))))
    right, log_probability, count = np.sum(found, axis=0)
    return float(right / count), float(np.exp(-log_probability / count))


def read_rows(path: Path, about: dict[str, Any]) -> list[Row]:
    """What was measured before, in the order of measurements.

    Raises:
      SystemExit: If the file is damaged, or of another measurement.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        rows = [Row(**row) for row in found["rows"]]
        changed = [name for name in about if found["about"].get(name) != about[name]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"{path} is damaged ({error}): remove it to begin again") from None
    if changed:
        raise SystemExit(
            f"{path} was measured with another {', '.join(changed)}: give another --folder, or "
            "remove the file to begin again"
        )
    return rows


def write_rows(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes the file whole, in place of the one before; a row is a line."""
    lines = ",\n  ".join(json.dumps(dataclasses.asdict(row)) for row in rows)
    text = f'{{\n "about": {json.dumps(about)},\n "rows": [\n  {lines}\n ]\n}}\n'
    beside = path.with_suffix(".partial")
    beside.write_text(text)
    beside.replace(path)


def run(
    exact: nnx.Module,
    batches: Sequence[Any],
    asked: Sequence[Case],
    draws: int,
    path: Path,
    about: dict[str, Any],
) -> list[Row]:
    """Measures what the file does not have yet; the file is written after every measurement."""
    rows = read_rows(path, about)
    known = {(row.attention, row.features, row.window, row.draw) for row in rows}
    for draw in range(draws):
        for case in asked:
            key = (case.name, case.features, case.window, draw)
            if key in known or (draw and not case.random):
                continue
            found = measure(with_attention(exact, case.make(), nnx.Rngs(draw)), batches)
            rows.append(Row(*key, *found))
            write_rows(path, about, rows)
            print(f"{' '.join(map(str, key))}: {found[0]:.4f} {found[1]:.4f}", flush=True)
            jax.clear_caches()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trained_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--fasta", type=Path, default=FASTA, help="sequences")
    parser.add_argument("--sequences", type=int, default=64, help="how many")
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 256])
    parser.add_argument("--windows", type=int, nargs="*", default=[8])
    parser.add_argument("--estimators", choices=ESTIMATORS, nargs="+", default=ESTIMATORS)
    parser.add_argument("--draws", type=int, default=3, help="of the random features")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="for figures and picture (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        exact = load_pretrained(options.model).model
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    sequences = read_sequences(options.fasta, options.sequences)
    batches = masked_batches(sequences, read_vocabulary(options.model), MASKED, 0)
    about = {
        "model": options.model.resolve().name,
        "fasta": options.fasta.name,
        "sequences": len(sequences),
        "masked residues": sum(int(hidden.sum()) for _, _, hidden in batches),
    }
    print(", ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    asked = cases(options.features, options.windows, options.estimators)
    rows = run(exact, batches, asked, options.draws, options.folder / NUMBERS, about)
    print(make_table(rows))
    draw_picture(rows, options.folder / PICTURE, about["model"])


if __name__ == "__main__":
    main()
