"""Pictures and tables of how well random features approximate softmax attention.

    taskset -c 0 python -m benchmarks.approximation_figure

measures, and writes pictures and ``approximation.json`` into docs/images; ``--only paper`` and the
like make one of them. ``--tables`` prints the tables of docs/choosing-features.md from that file.

* paper: figure 4 of arXiv:2009.14794 (positive against trigonometric features, orthogonal against
  independent rows, error against M; L = 4096, D = 16, 15 draws, as there) with WDERF-S and uniform
  attention beside them. Trigonometric features have two per row, so that their M rows give 2 M.
* gaussian, anisotropic, minilm, rxnfp: every estimator, on data of :mod:`.approximation_error`.
* matrices: exact and implicit attention matrices of one head.

Shape letters: L length, D head width, M features.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.approximation_error import DATA, Data, gaussian
from benchmarks.approximation_tables import tables
from fast_attention import FastAttention, make_fast_softmax_attention
from fast_attention.diagnostics.curves import ErrorCurves, error_curves
from fast_attention.diagnostics.errors import attention_matrix
from fast_attention.diagnostics.plots import plot_errors, plot_matrices
from fast_attention.feature_maps import TUNED_ESTIMATORS
from fast_attention.mechanisms.favor.softmax_maps import ESTIMATORS as ALL_ESTIMATORS
from fast_attention.mechanisms.favor.softmax_maps import LEARNED_ESTIMATORS
from fast_attention.softmax_attention import make_softmax_attention

ESTIMATORS = tuple(name for name in ALL_ESTIMATORS if name not in LEARNED_ESTIMATORS)
"""Those that need no training: on these data nothing is learned."""

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NUMBERS = "approximation.json"
BEST = "orthogonal_antithetic"
MATRICES = "matrices"
HEAD = 6
TOKENS = 64
"""The head of MiniLM whose matrices are drawn, the median by effective keys, and how much text."""

NEAR = "wderf_s, window 32"
"""Exact weights 32 positions to either side."""

Maker = Callable[[int], FastAttention]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one picture shows.

    Attributes:
      data: Names and makers of what is attended in, one panel each.
      functions: Names and makers of what is judged.
      features: Numbers of them.
      draws: Of the projection.
      emphasis: Names drawn in colour; None is all.
      largest: Upper end of the axis of errors.
    """

    data: Mapping[str, Callable[[], Data]]
    functions: Mapping[str, Maker]
    features: tuple[int, ...] = (16, 64, 256, 1024)
    draws: int = 4
    emphasis: tuple[str, ...] | None = None
    largest: float = 2.0


def maker(estimator: str, projection: str, window: int | None = None) -> Maker:
    """Returns the function from M to an attention function, calibrated on what it is given."""
    options: dict[str, Any] = {"calibration": "stored"} if estimator in TUNED_ESTIMATORS else {}
    return lambda features: make_fast_softmax_attention(
        nb_features=features,
        estimator=estimator,
        projection=projection,
        exact_window=window,
        **options,
    )


def every_estimator() -> dict[str, Maker]:
    """All estimators with orthogonal rows, and what the guide recommends."""
    found = {name: maker(name, "orthogonal") for name in ESTIMATORS}
    found["favor+, sqrt(D)"] = maker("favor+", "orthogonal_sqrt_d")
    found["wderf_s, antithetic"] = maker("wderf_s", BEST)
    return found


PAPER = {
    "trigonometric, iid": maker("trigonometric", "iid"),
    "trigonometric, orthogonal": maker("trigonometric", "orthogonal"),
    "positive, iid": maker("favor+", "iid"),
    "positive, orthogonal": maker("favor+", "orthogonal"),
    "wderf_s, antithetic": maker("wderf_s", BEST),
}
SHOWN = ("favor+", "favor++", "centred_aderf+", "wderf", "wderf_s, antithetic")


def on_heads(name: str) -> Measurement:
    """Every estimator on trained heads, and a near field."""
    near = {NEAR: maker("wderf_s", BEST, window=32)}
    return Measurement(
        {name: DATA[name]},
        every_estimator() | near,
        features=(16, 64, 256, 1024, 4096),
        emphasis=(*SHOWN, NEAR),
    )


MEASUREMENTS = {
    "paper": Measurement(
        {
            f"Gaussian, standard deviation {s:g}, L = 4096, D = 16": functools.partial(
                gaussian, s, 4096, 16
            )
            for s in (1.0, 0.5)
        },
        PAPER,
        features=(16, 32, 64, 128, 256),
        draws=15,
        largest=3000.0,
    ),
    "gaussian": Measurement(
        {name: DATA[name] for name in ("iid 0.5", "iid 1")},
        every_estimator(),
        emphasis=SHOWN,
        largest=8.0,
    ),
    "anisotropic": Measurement(
        {name: DATA[name] for name in ("anisotropic 1", "anisotropic 2")},
        every_estimator(),
        emphasis=SHOWN,
    ),
    "minilm": on_heads("minilm"),
    "rxnfp": on_heads("rxnfp"),
}
"""Pictures of errors, by name."""


def arrays(data: Data) -> tuple[jax.Array, jax.Array, jax.Array]:
    """With a batch axis, ``[1, L, H, D]``."""
    query, key, value = (jnp.asarray(x)[None] for x in data)
    return query, key, value


def measure(what: Measurement) -> dict[str, ErrorCurves]:
    """Returns the panels of a picture."""
    return {
        name: error_curves(
            what.functions, *arrays(make()), features=what.features, draws=what.draws
        )
        for name, make in what.data.items()
    }


def as_numbers(curves: ErrorCurves, data: Data) -> dict[str, Any]:
    """Returns what is kept of a panel: errors ``[P, R, H]``, and effective keys of the data."""
    return {
        "features": list(curves.features),
        "effective keys": _short(effective_keys(data)),
        "uniform": _short(curves.uniform),
        "errors": {name: _short(errors) for name, errors in curves.errors.items()},
    }


def as_curves(panel: Mapping[str, Any]) -> ErrorCurves:
    """Reads what :func:`as_numbers` returned."""
    errors = {name: np.asarray(values) for name, values in panel["errors"].items()}
    return ErrorCurves(tuple(panel["features"]), errors, np.asarray(panel["uniform"]))


def effective_keys(data: Data, rows: int = 256) -> np.ndarray:
    """Returns the mean of ``exp(entropy)`` of softmax rows ``[H]``, over evenly spaced queries."""
    query, key = (np.swapaxes(x, 0, 1).astype(np.float64) for x in data[:2])
    query = query[:, np.linspace(0, query.shape[1] - 1, rows).round().astype(int)]
    logits = query @ np.swapaxes(key, 1, 2) / query.shape[-1] ** 0.5
    logits -= logits.max(-1, keepdims=True)
    total = np.exp(logits).sum(-1)
    entropy = np.log(total) - (np.exp(logits) * logits).sum(-1) / total
    return np.exp(entropy).mean(-1)


def _short(values: np.ndarray) -> Any:
    """Nested lists of numbers of three digits."""
    return np.vectorize(lambda x: float(f"{x:.3g}"), otypes=[float])(values).tolist()


def shrink(path: Path) -> None:
    """Keeps 256 colours of a picture, which makes its file half as large."""
    image = importlib.import_module("PIL.Image")
    with image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, kmeans=2)
    small.save(path, optimize=True)


def draw_matrices(folder: Path) -> None:
    """Draws exact attention of one head beside FAVOR+ and WDERF-S with 256 features."""
    query, key, _ = arrays(DATA["minilm"]())
    query, key = (x[:, :TOKENS, HEAD : HEAD + 1] for x in (query, key))
    functions = {
        "exact": make_softmax_attention(),
        "favor+, M = 256": make_fast_softmax_attention(nb_features=256),
        "wderf_s, M = 256": make_fast_softmax_attention(
            nb_features=256, estimator="wderf_s", projection=BEST
        ),
    }
    matrices = {name: attention_matrix(f, query, key)[0, 0] for name, f in functions.items()}
    path = folder / "attention-matrices.png"
    plot_matrices(matrices, path)
    shrink(path)


def draw(name: str, folder: Path, panels: Mapping[str, Any]) -> None:
    """Draws a picture of errors from its numbers."""
    what, path = MEASUREMENTS[name], folder / f"approximation-{name}.png"
    curves = {title: as_curves(panel) for title, panel in panels.items()}
    plot_errors(curves, path, emphasis=what.emphasis, largest=what.largest)
    shrink(path)
    print(path, flush=True)


def run(names: Sequence[str], folder: Path, redraw: bool = False) -> None:
    """Measures and draws; numbers of pictures not asked for are kept.

    Args:
      names: Of pictures.
      folder: For pictures and numbers.
      redraw: Measure nothing, draw the numbers that are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == MATRICES:
            draw_matrices(folder)
            continue
        what, file = MEASUREMENTS[name], folder / NUMBERS
        curves = {} if redraw else measure(what)
        # Read late: another run may have measured another picture meanwhile.
        kept = json.loads(file.read_text()) if file.exists() else {}
        if not redraw:
            kept[name] = {title: as_numbers(curves[title], what.data[title]()) for title in curves}
            lines = json.dumps({key: kept[key] for key in MEASUREMENTS if key in kept}, indent=1)
            # Innermost lists on one line each.
            lines = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), lines)
            file.write_text(lines + "\n")
        draw(name, folder, kept[name])


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the pictures, or prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.approximation_figure",
        description=(__doc__ or "").split("\n", 1)[0],
    )
    choices = [*MEASUREMENTS, MATRICES]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices)
    parser.add_argument("--folder", type=Path, default=IMAGES, help="(%(default)s)")
    parser.add_argument("--redraw", action="store_true", help="draw what was measured before")
    parser.add_argument("--tables", action="store_true", help="print the tables of the numbers")
    options = parser.parse_args(arguments)
    if options.tables:
        print(tables(json.loads((options.folder / NUMBERS).read_text())))
    else:
        run(options.only, options.folder, options.redraw)


if __name__ == "__main__":
    main()
