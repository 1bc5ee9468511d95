"""Linear models on the vectors of proteins: ridge and logistic regression, solved exactly.

Shape letters: N proteins, M width of a vector, K outputs (1 of a regression, else classes).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

_PENALTIES = 10.0 ** np.arange(-4, 3.5, 0.5)


class Units(NamedTuple):
    """How numbers are standardised: ``number = spread * standardised + centre``, in float64.

    Attributes:
      centre: Mean of the numbers.
      spread: Their standard deviation.
    """

    centre: float
    spread: float

    @classmethod
    def of(cls, numbers: np.ndarray) -> Units:
        """Mean and standard deviation of finite numbers of any size, float64 ``[N]``."""
        # Powers of two change no digit, and squares stay in range.
        power = int(np.frexp(np.abs(numbers).max())[1])
        scaled = np.ldexp(numbers, -power)
        centre = scaled.mean()
        return cls(float(np.ldexp(centre, power)), float(np.ldexp((scaled - centre).std(), power)))

    def standardise(self, numbers: np.ndarray) -> np.ndarray:
        """From numbers to standardised ones."""
        power = int(np.frexp(max(abs(self.centre), self.spread))[1])
        differences = np.ldexp(numbers, -power) - np.ldexp(self.centre, -power)
        return differences / np.ldexp(self.spread, -power)

    def restore(self, standardised: np.ndarray) -> np.ndarray:
        """From standardised numbers to numbers, float64."""
        return standardised.astype(np.float64) * self.spread + self.centre


class LinearHead(NamedTuple):
    """``(x - mean) / scale @ kernel + bias``.

    Attributes:
      mean: float32 ``[M]``, of the training vectors.
      scale: float32 ``[M]``, their standard deviations.
      kernel: float32 ``[M, K]``.
      bias: float32 ``[K]``.
      units: float64 ``[2]``, `Units` of the numbers that a regression predicts; outputs of the head
        are standardised.
    """

    mean: Any
    scale: Any
    kernel: Any
    bias: Any
    units: Any = (0.0, 1.0)

    def __call__(self, vectors: Any) -> Any:
        """From float ``[N, M]`` to ``[N, K]``."""
        return (vectors - self.mean[None]) / self.scale[None] @ self.kernel + self.bias[None]


def fit_regression(
    train: tuple[np.ndarray, np.ndarray], valid: tuple[np.ndarray, np.ndarray]
) -> tuple[LinearHead, float]:
    """Ridge regression, with the penalty of the least squared error on other proteins.

    Args:
      train: Vectors ``[N, M]`` and targets ``[N]`` to fit.
      valid: The same of the proteins that choose the penalty.

    Returns:
      The head and the penalty p in ``mean((x w + b - y)^2) + p |w|^2``.
    """
    mean, scale, x = _standardise(train[0])
    centre = train[1].mean()
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    projected = left.T @ (train[1] - centre)
    best = None
    for penalty in _PENALTIES:
        weights = right.T @ (singular / (singular**2 + penalty * len(x)) * projected)
        head = _head(mean, scale, weights[:, None], np.array([centre]))
        error = float(((head(valid[0])[:, 0] - valid[1]) ** 2).mean())
        if best is None or error < best[0]:
            best = (error, head, float(penalty))
    assert best is not None
    return best[1:]


def fit_classification(
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    class_weights: np.ndarray,
) -> tuple[LinearHead, float]:
    """Logistic regression, with the penalty of the least cross-entropy on other proteins.

    Args:
      train: Vectors ``[N, M]`` and classes, int ``[N]``, to fit.
      valid: The same of the proteins that choose the penalty.
      class_weights: float ``[K]``, how much a protein of each class counts, here and there.

    Returns:
      The head and the penalty p in ``mean cross-entropy + p |w|^2 / 2``.
    """
    mean, scale, x = _standardise(train[0])
    number = len(class_weights)
    start = np.zeros((x.shape[1] + 1, number))
    best = None
    # From strong to weak penalties, each begins where the last ended.
    for penalty in _PENALTIES[::-1]:
        found = minimize(
            _logistic_loss,
            start.ravel(),
            (x, train[1], class_weights, float(penalty)),
            method="L-BFGS-B",
            jac=True,
            options={"maxiter": 300},
        )
        start = found.x.reshape(start.shape)
        head = _head(mean, scale, start[:-1], start[-1])
        loss = cross_entropy(head(valid[0]), valid[1], class_weights)
        if best is None or loss < best[0]:
            best = (loss, head, float(penalty))
    assert best is not None
    return best[1:]


def cross_entropy(logits: np.ndarray, classes: np.ndarray, class_weights: np.ndarray) -> float:
    """Mean cross-entropy of ``[N, K]``, each protein counted as its class says."""
    weights = class_weights[classes]
    chosen = log_softmax(logits.astype(np.float64), -1)[np.arange(len(classes)), classes]
    return float(-(weights * chosen).sum() / max(weights.sum(), 1e-30))


def _logistic_loss(
    flat: np.ndarray,
    x: np.ndarray,
    classes: np.ndarray,
    class_weights: np.ndarray,
    penalty: float,
) -> tuple[float, np.ndarray]:
    parameters = flat.reshape(x.shape[1] + 1, -1)
    logits = x @ parameters[:-1] + parameters[-1][None]
    weights = class_weights[classes] / class_weights[classes].sum()
    logs = log_softmax(logits, -1)
    chosen = logs[np.arange(len(x)), classes]
    loss = -(weights * chosen).sum() + penalty / 2 * (parameters[:-1] ** 2).sum()
    slope = np.exp(logs)
    slope[np.arange(len(x)), classes] -= 1
    slope *= weights[:, None]
    gradient = np.concatenate([x.T @ slope + penalty * parameters[:-1], slope.sum(0)[None]])
    return float(loss), gradient.ravel()


def _standardise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    vectors = vectors.astype(np.float64)
    mean, scale = vectors.mean(0), vectors.std(0)
    # What is constant in training (except for rounding) must not become large elsewhere.
    scale = np.where(scale > 1e-6 * (1 + np.abs(mean)), scale, 1.0)
    return mean, scale, (vectors - mean[None]) / scale[None]


def _head(mean: Any, scale: Any, kernel: Any, bias: Any) -> LinearHead:
    return LinearHead(*(np.asarray(part, np.float32) for part in (mean, scale, kernel, bias)))
