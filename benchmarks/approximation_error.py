"""How far random features are from exact softmax attention.

``python -m benchmarks.approximation_error`` prints relative Frobenius errors of outputs, root mean
square over heads and draws of the projection: bidirectional, on Gaussian data and on queries, keys
and values of trained heads. ``--held-out`` calibrates on the first half of each text and measures
on the second.

Shape letters: L length, H heads, D head width, M features.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention import FastAttention, make_fast_softmax_attention
from fast_attention.mechanisms.favor.calibration import calibrate

HEADS = Path(__file__).parents[1] / "tests" / "data" / "attention_heads"

Data = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Queries, keys and values ``[L, H, D]``."""

CASES = (
    ("google", "orthogonal"),
    ("uniform", ""),
    ("favor+", "orthogonal"),
    ("favor+", "orthogonal_antithetic"),
    ("favor+", "orthogonal_sqrt_d"),
    ("favor++", "orthogonal"),
    ("sderf", "orthogonal"),
    ("centred_sderf", "orthogonal"),
    ("centred_aderf+", "orthogonal"),
    ("wderf", "orthogonal"),
    ("wderf_s", "orthogonal"),
    ("wderf_s", "simplex"),
    ("wderf_s", "orthogonal_antithetic"),
)
"""Estimators and couplings measured unless told otherwise."""


def gaussian(deviation: float, length: int = 1024, width: int = 64, seed: int = 0) -> Data:
    """Independent queries and keys of a standard deviation, values of 1; one head."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(length, 1, width)).astype(np.float32) for _ in range(3))
    return q * deviation, k * deviation, v


def anisotropic(deviation: float, length: int = 1024, width: int = 64, seed: int = 0) -> Data:
    """Eigenvalues ``l^-1.5`` in partly aligned bases, means as large as the spread; one head.

    Args:
      deviation: of the logits of centred queries and keys.
      length: L.
      width: D.
      seed: Of the data.
    """
    rng = np.random.default_rng(seed)
    scales = np.arange(1, width + 1) ** -0.75
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    turned = np.linalg.qr(basis + 0.3 * rng.normal(size=(width, width)) / width**0.5)[0]
    turned = turned * np.sign(np.sum(turned * basis, axis=0))
    q, k = (rng.normal(size=(length, width)) * scales @ b.T for b in (basis, turned))
    size = (deviation / np.std(q @ k.T / width**0.5)) ** 0.5
    shifted = []
    for x, ratio in ((q, 2.0), (k, 0.5)):
        mean = rng.normal(size=width)
        mean *= np.sqrt(np.mean(np.sum(x**2, axis=1))) / np.linalg.norm(mean)
        shifted.append((size * ratio * (x + mean))[:, None].astype(np.float32))
    return *shifted, rng.normal(size=(length, 1, width)).astype(np.float32)


def trained_heads(name: str) -> Data:
    """Heads of a trained encoder, "minilm" or "rxnfp"."""
    with np.load(HEADS / f"{name}.npz") as file:
        q, k, v = (np.swapaxes(file[part], 0, 1).astype(np.float32) for part in "qkv")
    return q, k, v


DATA = {
    "iid 0.5": functools.partial(gaussian, 0.5),
    "iid 1": functools.partial(gaussian, 1.0),
    "anisotropic 1": functools.partial(anisotropic, 1.0),
    "anisotropic 2": functools.partial(anisotropic, 2.0),
    "minilm": functools.partial(trained_heads, "minilm"),
    "rxnfp": functools.partial(trained_heads, "rxnfp"),
}
"""What is measured on, by name."""


def exact(data: Data) -> np.ndarray:
    """Softmax attention ``[L, H, D]`` in float64."""
    q, k, v = (np.swapaxes(x, 0, 1).astype(np.float64) for x in data)
    logits = q @ np.swapaxes(k, 1, 2) / q.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.swapaxes(weights / weights.sum(-1, keepdims=True) @ v, 0, 1)


def google(data: Data, rows: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """What the formula of google-research/performer gives: 1e-6 added to features and sums."""
    q, k, v = (np.swapaxes(x, 0, 1) for x in data)
    scale = q.shape[-1] ** -0.25
    features = []
    for x, axes in ((q, -1), (k, (-2, -1))):
        dash = scale * x @ rows.T
        norm = 0.5 * scale**2 * np.sum(x * x, -1, keepdims=True)
        features.append(np.exp(dash - norm - dash.max(axes, keepdims=True)) + epsilon)
    weights = (features[0] @ np.swapaxes(features[1], 1, 2)).astype(np.float64) / len(rows)
    total = weights.sum(-1, keepdims=True)
    total = total + 2 * epsilon * (np.abs(total) <= epsilon)
    return np.swapaxes(weights @ v / total, 0, 1)


def squared_errors(
    estimator: str,
    coupling: str,
    data: Data,
    *,
    features: int,
    draws: int,
    sample: Data | None = None,
) -> np.ndarray:
    """Relative squared errors of outputs ``[draws, H]``.

    Args:
      estimator: A name of ``make_fast_softmax_attention``, "google" or "uniform".
      coupling: Of its rows.
      data: To attend in.
      features: M.
      draws: Independent projections.
      sample: To calibrate on; None takes the data themselves.
    """
    target = exact(data)
    keys = jax.random.split(jax.random.key(0), draws)
    if estimator == "uniform":
        out = np.broadcast_to(data[2].mean(0, keepdims=True), (1, *target.shape))
    else:
        attention = make_fast_softmax_attention(
            nb_features=features,
            estimator="favor+" if estimator == "google" else estimator,
            projection=coupling,
        )
        draw = functools.partial(attention.draw_projection, head_dim=target.shape[-1])
        rows: Any = jax.jit(jax.vmap(draw))(keys)
        if estimator == "google":
            out = np.stack([google(data, np.asarray(w)) for w in rows])
        else:
            calibrated = sample is not None and attention.calibration is not None
            run = jax.jit(functools.partial(_attend, attention, calibrated))
            seen = data if sample is None else sample
            arrays = [jnp.asarray(x)[None] for x in (*data, seen[0], seen[1])]
            out = np.stack([np.asarray(run(w, *arrays), np.float64) for w in rows])
    error = np.sum((out - target[None]) ** 2, axis=(1, 3))
    return error / np.sum(target**2, axis=(0, 2))[None]


def _attend(
    attention: FastAttention, calibrated: bool, rows: jax.Array, q, k, v, seen_q, seen_k
) -> jax.Array:
    projection = rows
    if calibrated:
        projection = calibrate(attention, seen_q, seen_k, projection=rows)
    return attention(q, k, v, projection=projection)[0]


def halves(data: Data) -> tuple[Data, Data]:
    """The first and the second half of a text."""
    middle = len(data[0]) // 2
    q, k, v = data
    return (q[:middle], k[:middle], v[:middle]), (q[middle:], k[middle:], v[middle:])


def table(names: Sequence[str], features: int, draws: int, held_out: bool) -> Iterator[str]:
    """Yields lines of Markdown: root mean square errors, and the gain over Google's formula."""
    yield "| estimator | coupling | " + " | ".join(names) + " |"
    yield "|---|---|" + "---|" * len(names)
    baseline: dict[str, float] = {}
    for estimator, coupling in CASES:
        cells = []
        for name in names:
            data, sample = DATA[name](), None
            if held_out:
                sample, data = halves(data)
            errors = squared_errors(
                estimator, coupling, data, features=features, draws=draws, sample=sample
            )
            mean = float(errors.mean())
            baseline.setdefault(name, mean)
            cells.append(f"{mean**0.5:.3f} ({baseline[name] / mean:.1f}x)")
        yield f"| {estimator} | {coupling} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--features", type=int, default=256, help="M (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="of the projection (%(default)s)")
    parser.add_argument("--held-out", action="store_true", help="calibrate on the first half")
    options = parser.parse_args(arguments)
    for line in table(options.data, options.features, options.draws, options.held_out):
        print(line, flush=True)


if __name__ == "__main__":
    main()
