"""Attention transfer on single trained heads: ``python -m benchmarks.heads_transfer``.

The features of each head of MiniLM and of rxnfp are trained on the first half of its text, to
reproduce the outputs of exact attention. The table has relative Frobenius errors of outputs on the
second half, root mean square over heads and draws of the random features: before training
(calibrated on the first half, where an estimator can be), and after it.

Shape letters: L length, H heads, D head width, M features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.approximation_error import Data, exact, halves, trained_heads
from fast_attention import FastAttention, make_fast_softmax_attention
from fast_attention.mechanisms.favor.calibration import calibrate

RATES = {"favor+": 0.0, "wderf_s": 1e-3, "hedgehog": 1e-2, "darkformer": 1e-2}
"""Estimators, and their learning rates; FAVOR+ has nothing to train."""

HEADS = ("minilm", "rxnfp")


class Errors(NamedTuple):
    """Relative errors of outputs of each head, ``[H]``.

    Attributes:
      before: on new text, before training.
      after: on new text, after it.
      trained: on the text of the training, after it.
    """

    before: np.ndarray
    after: np.ndarray
    trained: np.ndarray


def transfer(
    estimator: str,
    data: Data,
    *,
    features: int,
    window: int | None,
    steps: int,
    seed: int,
) -> Errors:
    """Trains the features of every head on the first half of a text.

    Args:
      estimator: a name in :data:`RATES`.
      data: queries, keys and values ``[L, H, D]``.
      features: M.
      window: exact weights for keys at a distance below this; None for none.
      steps: of Adam; the rate decreases to 0 as a cosine.
      seed: of the random features.
    """
    attention = make_fast_softmax_attention(
        nb_features=features,
        estimator=estimator,
        exact_window=window,
        calibration="trained" if estimator == "wderf_s" else None,
    )
    known, new = (
        tuple(jnp.asarray(x)[None] for x in (*half, exact(half).astype(np.float32)))
        for half in halves(data)
    )
    heads, width = data[0].shape[1:]
    drawn = attention.draw_projection(jax.random.key(seed), width)
    if estimator == "wderf_s":
        initial = calibrate(attention, known[0], known[1], projection=drawn)
    else:
        initial = jax.tree.map(lambda x: jnp.broadcast_to(x, (heads, *x.shape)), drawn)
    rate = RATES[estimator]
    final = _train(attention, initial, known, steps, rate) if rate else initial
    judge = jax.jit(lambda parameters, text: jnp.sqrt(_squares(attention, parameters, text)))
    return Errors(
        *(np.asarray(judge(p, x)) for p, x in ((initial, new), (final, new), (final, known)))
    )


def _squares(attention: FastAttention, parameters: Any, text: tuple[Any, ...]) -> jax.Array:
    """Relative squared errors of outputs by head."""
    query, key, value, target = text
    out = attention(query, key, value, projection=parameters)
    axes = (0, 1, 3)
    return jnp.sum((out - target) ** 2, axes) / jnp.sum(target**2, axes)


def _train(
    attention: FastAttention, parameters: Any, text: tuple[Any, ...], steps: int, rate: float
) -> Any:
    """Minimizes the mean squared error of heads; random rows do not change."""
    names = [name for name, x in parameters._asdict().items() if x is not None and name != "rows"]
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(trained: dict[str, Any]) -> jax.Array:
        return _squares(attention, parameters._replace(**trained), text).mean()

    def step(carry: Any, _: None) -> tuple[Any, None]:
        trained, state = carry
        updates, state = optimizer.update(jax.grad(loss)(trained), state)
        return (optax.apply_updates(trained, updates), state), None

    trained = {name: getattr(parameters, name) for name in names}
    carry = (trained, optimizer.init(trained))
    (trained, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))(carry)
    return parameters._replace(**trained)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--heads", nargs="+", choices=HEADS, default=HEADS, help="whose heads (%(default)s)")
    add("--estimators", nargs="+", choices=tuple(RATES), default=tuple(RATES))
    add("--features", type=int, nargs="+", default=[32, 64], help="M (32 64)")
    add("--windows", type=int, nargs="+", default=[0, 8], help="0 for none (0 8)")
    add("--steps", type=int, default=300, help="of training (%(default)s)")
    add("--draws", type=int, default=3, help="of the random features (%(default)s)")
    options = parser.parse_args(arguments)
    print("| heads | estimator | window | features | not trained | trained | on the trained half |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in options.heads:
        for window in options.windows:
            for estimator in options.estimators:
                for features in options.features:
                    found = [
                        transfer(
                            estimator,
                            trained_heads(name),
                            features=features,
                            window=window or None,
                            steps=options.steps,
                            seed=seed,
                        )
                        for seed in range(options.draws)
                    ]
                    cells = [
                        f"{np.sqrt(np.mean(np.square(x))):.3f}" for x in zip(*found, strict=True)
                    ]
                    row = [name, estimator, str(window or ""), str(features), *cells]
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
