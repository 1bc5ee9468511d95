"""Which attention to train a small model with: ``python -m benchmarks.estimators_from_scratch``.

Causal models of the demo's size are trained from scratch on the demo's corpus, for equally many
steps on equal batches, with exact attention, with estimators of it, all of 64 features, and with
ReLU features. Models of one seed see the same batches and begin with the same weights as far as
they have the same ones, so that differences from exact attention are taken seed by seed: mean and
standard error of these over seeds.

Runs are ordinary run folders: what is finished is not trained again, and what was interrupted goes
on. ``--report`` trains nothing and tells what is finished.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.protein_models import (
    evaluation_file,
    mean_and_error,
    read_figures,
    train_and_evaluate,
)

_ANTITHETIC = "make_fast_softmax_attention.projection = 'orthogonal_antithetic'"
_WDERF_S = ["make_fast_softmax_attention.estimator = 'wderf_s'", _ANTITHETIC]
_RELU = [
    "FlaxModel.attention_fn = @make_fast_generalized_attention()",
    "make_fast_generalized_attention.nb_features = 64",
    "make_fast_generalized_attention.features_type = 'ortho'",
    "make_fast_generalized_attention.kernel_fn = @jrelu",
]

BASELINE = "exact"
VARIANTS = {
    BASELINE: ["FlaxModel.attention_fn = None"],
    "favor+": [],
    "favor+ antithetic": [_ANTITHETIC],
    "favor+ unit": ["FlaxModel.qk_norm = True"],
    "favor+ window": ["make_fast_softmax_attention.exact_window = 32"],
    "relu": _RELU,
    "wderf_s running": [
        *_WDERF_S,
        "make_fast_softmax_attention.calibration = 'stored'",
        "make_fast_softmax_attention.moment_decay = 0.99",
        "FlaxModel.recalibrate_interval = 20",
    ],
    "wderf_s trained": [*_WDERF_S, "make_fast_softmax_attention.calibration = 'trained'"],
    "exact unit": ["FlaxModel.attention_fn = None", "FlaxModel.qk_norm = True"],
    "favor+ redrawn": ["FlaxModel.redraw_interval = 100"],
}
"""Lines of gin after those of the demo, by what the table calls them."""

SETS = {"valid": "valid", "test": "test"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, evaluates and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimators_from_scratch",
        description="Small protein models trained with exact and estimated attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=400, help="steps of 8 rows of 512 residues")
    add("--seeds", type=int, default=3, help="models of each kind")
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="NAME")
    add(
        "--folder",
        type=Path,
        default=Path("runs/estimators_from_scratch"),
        help="where the runs go, one folder for each number of steps",
    )
    add("--report", action="store_true", help="train nothing; tell what is finished")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    found: dict[str, dict[int, Any]] = {name: {} for name in options.variants}
    for seed in range(options.seeds):
        for name in options.variants:
            run = run_folder(options.folder, name, options.steps, seed)
            if not options.report:
                settings = ["experiment.model_cls = @FlaxLM", *VARIANTS[name]]
                train_and_evaluate(run, settings, options.steps, seed, SETS)
            if all(evaluation_file(run, part).exists() for part in SETS):
                found[name][seed] = read_figures(run, SETS)
    print(table(found))


def run_folder(folder: Path, name: str, steps: int, seed: int) -> Path:
    """Where the run of a variant is."""
    return folder / f"{steps}-steps" / f"{name.replace(' ', '-')}-{seed}"


def table(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """The table as Markdown.

    Args:
      found: What `train_and_evaluate` returned, by variant and seed.
    """
    lines = [
        "| attention | seeds | "
        + " | ".join(f"{name}, perplexity | less exact" for name in SETS)
        + " | min |",
        "| --- | ---: | " + "---: | " * (2 * len(SETS) + 1),
    ]
    exact = found.get(BASELINE, {})
    for name, runs in found.items():
        if not runs:
            continue
        cells = [name, str(len(runs))]
        for part in SETS:
            cells.append(mean_and_error([_perplexity(run, part) for run in runs.values()]))
            differences = [
                _perplexity(run, part) - _perplexity(exact[seed], part)
                for seed, run in runs.items()
                if seed in exact
            ]
            cells.append("" if name == BASELINE else mean_and_error(differences, "+"))
        cells.append(f"{statistics.mean(run['minutes'] for run in runs.values()):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _perplexity(run: Mapping[str, Any], part: str) -> float:
    return run[part]["scores"][0]["perplexity"]


if __name__ == "__main__":
    main()
