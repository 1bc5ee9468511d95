"""How well a property of proteins is predicted.

Shape letters: N proteins, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import spearmanr


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays ``[N]``; 0 where one of them is constant."""
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    return float(np.asarray(spearmanr(x, y))[0])


def regression_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Figures of predicted numbers.

    Args:
      truth: float ``[N]``.
      predicted: float ``[N]``.

    Returns:
      ``spearman``, ``r2`` (1 - residual / total sum of squares, which is negative where the mean
      of `truth` would be the better guess), ``rmse`` and ``rmse_of_mean`` (of that guess).
    """
    largest = max(np.abs(truth).max(), np.abs(predicted).max())
    # Powers of two change no digit, and squares of huge and tiny numbers stay in range.
    power = int(np.frexp(largest)[1]) + 1
    truth, predicted = np.ldexp(truth, -power), np.ldexp(predicted, -power)
    residuals, deviations = truth - predicted, truth - truth.mean()
    unit = max(np.abs(residuals).max(), np.abs(deviations).max()) or 1.0
    residual = float(((residuals / unit) ** 2).mean())
    total = float(((deviations / unit) ** 2).mean())
    return {
        "spearman": spearman(truth, predicted),
        "r2": 1 - residual / total if total else 0.0,
        "rmse": float(np.ldexp(residual**0.5 * unit, power)),
        "rmse_of_mean": float(np.ldexp(total**0.5 * unit, power)),
    }


def classification_metrics(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Figures of predicted classes.

    Args:
      truth: int ``[N]``.
      probabilities: float ``[N, K]``.

    Returns:
      ``accuracy``, ``accuracy_of_majority`` (of always guessing the class that is most frequent in
      `truth`), ``macro_f1`` (the mean over the classes that occur or were predicted), ``loss``
      (mean cross-entropy in nats) and ``confusion`` (rows are true, columns predicted classes).
    """
    number = probabilities.shape[1]
    predicted = probabilities.argmax(-1)
    confusion = np.bincount(truth * number + predicted, minlength=number**2)
    confusion = confusion.reshape(number, number)
    hits, given, found = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    occurs = given + found > 0
    chosen = probabilities[np.arange(len(truth)), truth]
    return {
        "accuracy": float(hits.sum() / len(truth)),
        "accuracy_of_majority": float(given.max() / len(truth)),
        "macro_f1": float((2 * hits[occurs] / (given + found)[occurs]).mean()),
        "loss": float(-np.log(np.maximum(chosen, 1e-30)).mean()),
        "confusion": confusion.tolist(),
    }
