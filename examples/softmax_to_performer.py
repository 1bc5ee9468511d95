"""Makes Performers of a Transformer trained with exact attention, and trains them a little further.

A small causal protein model is trained with softmax attention (or taken from --run). Then its
attention function is exchanged, and nothing else: the parameters are the same. For each function
this tells the validation loss as it is after the exchange, once the random features are calibrated
on training proteins, and in the course of some steps of training; the exact model is trained for
the same steps on the same batches, so that what training alone brings is seen, too.

    python -m examples.softmax_to_performer --output runs/softmax_to_performer

The folder gets one JSON file for each function (what is there is not computed again), a table
(table.md) and a picture (recovery.png).

Reference: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794, section 4.3
(backward compatibility).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import cli, data
from fast_attention.protein_lm.corpus import bundled_corpus
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.optimizer import create_learning_rate_scheduler
from fast_attention.protein_lm.run_folder import write_file

EXACT = "exact"
_FAVOR: dict[str, Any] = {"unidirectional": True, "chunk_size": 32}
_WDERF = _FAVOR | {"estimator": "wderf_s", "projection": "orthogonal_antithetic"}
VARIANTS: dict[str, dict[str, Any] | None] = {
    EXACT: None,
    "favor+ 64": _FAVOR | {"nb_features": 64},
    "wderf_s 64": _WDERF | {"nb_features": 64},
    "wderf_s 64, window 32": _WDERF | {"nb_features": 64, "exact_window": 32},
    "favor+ 256": _FAVOR | {"nb_features": 256},
    "wderf_s 256": _WDERF | {"nb_features": 256},
}
"""Arguments of `make_fast_softmax_attention`; None is exact attention."""

_CONFIG = Path(__file__).parents[1] / "protein_lm_configs" / "demo.gin"


def train_exact(folder: Path, steps: int, settings: Sequence[str] = ()) -> None:
    """Trains the model of demo.gin, but with exact attention; a finished run stays as it is.

    Args:
      folder: Where the run goes.
      steps: Of training.
      settings: More gin settings.

    Raises:
      RuntimeError: If training fails.
    """
    warmup = max(1, steps // 10)
    bindings = [
        "FlaxModel.attention_fn = None",
        f"experiment.max_train_steps = {steps}",
        f"experiment.eval_frequency = {steps}",
        f"experiment.checkpoint_frequency = {min(200, steps)}",
        "experiment.num_samples = 0",
        f"create_learning_rate_scheduler.warmup_steps = {warmup}",
        f"create_learning_rate_scheduler.steps_per_cycle = {steps - warmup}",
        *settings,
    ]
    options = [f"--gin_bindings={binding}" for binding in bindings]
    test = f"--test_fasta={bundled_corpus('tiny')}"
    status = cli.main(["train", f"--gin_file={_CONFIG}", f"--work_dir={folder}", test, *options])
    if status:
        raise RuntimeError(f"the training of {folder} ended with status {status}")


def proteins(model: FlaxLM, split: str, seed: int, length: int, rows: int) -> Iterator[Any]:
    """Batches of packed proteins: of the bundled corpus, the same for every model."""
    return iter(
        data.make_dataset(
            str(bundled_corpus(split)),
            model.domain,
            length=length,
            batch_size=rows,
            seed=seed,
            pack=True,
        )
    )


def follow(exact: FlaxLM, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Exchanges the attention function of a model, calibrates it and trains it further.

    Args:
      exact: The trained model.
      name: A key of `VARIANTS`.
      options: Of the command.

    Returns:
      ``before``, the loss of the model given; ``switched`` and, for features with stored
      parameters, ``calibrated``, those before training; ``curve``, pairs of a step and the loss.
    """
    sizes = options.length, options.rows
    valid = list(itertools.islice(proteins(exact, "valid", 7, *sizes), options.valid_batches))

    def loss(model: FlaxLM) -> float:
        found = model.evaluate(valid)["loss"]
        print(f"{name}: {found:.4f}", flush=True)
        return found

    given = VARIANTS[name]
    attention_fn = None if given is None else make_fast_softmax_attention(**given)
    warmup = create_learning_rate_scheduler(
        "constant * linear_warmup", options.learning_rate, warmup_steps=10
    )
    model = exact.with_attention(attention_fn, learning_rate=warmup)
    result: dict[str, Any] = {"switched": loss(model)}
    if attention_fn is not None and attention_fn.calibration == "stored":
        model.calibrate(proteins(exact, "train", 1, *sizes), num_batches=options.calibration)
        result["calibrated"] = loss(model)
    curve = [(0, result.get("calibrated", result["switched"]))]
    batches = proteins(exact, "train", 2, *sizes)
    while curve[-1][0] < options.steps:
        more = min(options.every, options.steps - curve[-1][0])
        model.fit(batches, max_steps=more)
        curve.append((curve[-1][0] + more, loss(model)))
    return result | {"curve": curve}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.softmax_to_performer",
        description="Performers from a Transformer trained with exact attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/softmax_to_performer"), help="folder of results")
    add("--run", type=Path, help="a run with exact attention; without it, one is trained first")
    add("--exact_steps", type=int, default=400, help="training steps of that")
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    add("--steps", type=int, default=200, help="training steps after the exchange")
    add("--every", type=int, default=25, help="steps between two validations")
    add("--learning_rate", type=float, default=3e-4, help="of these steps, after 10 of warmup")
    add("--length", type=int, default=512, help="tokens of a row")
    add("--rows", type=int, default=8, help="rows of a batch")
    add("--valid_batches", type=int, default=6, help="batches of validation")
    add("--calibration", type=int, default=4, help="batches to calibrate on")
    options = parser.parse_args(arguments)
    run = options.run or options.output / "exact_run"
    if options.run is None:
        train_exact(run, options.exact_steps)
    exact = FlaxLM.load(run)
    for name in options.variants:
        path = options.output / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(follow(exact, name, options), indent=1) + "\n")


if __name__ == "__main__":
    main()
