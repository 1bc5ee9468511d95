"""The protein table of the Performer paper at small size: ``python -m benchmarks.protein_models``.

A Transformer with exact attention, a Performer with softmax features and one with ReLU features,
each causal and masked, are trained for equally many steps on equal batches (the demo's model and
corpus), and evaluated on proteins whose relatives were in training (IID) and on families that were
not (OOD). Runs are ordinary run folders: what is finished is not trained again, and what was
interrupted goes on.

Reference: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794, table 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ATTENTION = {
    "Transformer (exact)": ["FlaxModel.attention_fn = None"],
    "Performer (softmax)": ["FlaxModel.attention_fn = @make_fast_softmax_attention()"],
    "Performer (ReLU)": [
        "FlaxModel.attention_fn = @make_fast_generalized_attention()",
        "make_fast_generalized_attention.nb_features = 64",
        "make_fast_generalized_attention.features_type = 'ortho'",
        "make_fast_generalized_attention.kernel_fn = @jrelu",
    ],
}
MODELS = {"UNI": "FlaxLM", "BID": "FlaxBERT"}
SETS = {"IID": "test_iid", "OOD": "ood_test", "test": "test"}

_CONFIG = Path(__file__).parents[1] / "protein_lm_configs" / "demo.gin"


class Variant(NamedTuple):
    """One trained model.

    Attributes:
      direction: "UNI" or "BID".
      attention: A key of `ATTENTION`.
      seed: Of its parameters.
    """

    direction: str
    attention: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        attention = self.attention.partition("(")[2].rstrip(")").lower()
        return f"{self.direction.lower()}-{attention}-{self.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, evaluates and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.protein_models",
        description="Transformers and Performers on proteins, after equally many steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=400, help="steps of 8 rows of 512 residues")
    add("--seeds", type=int, default=1, help="models of each kind")
    add("--folder", type=Path, default=Path("runs/protein_models"), help="where the runs go")
    add("--directions", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    variants = [
        Variant(direction, attention, seed)
        for seed in range(options.seeds)
        for direction in options.directions
        for attention in ATTENTION
    ]
    rows = [(variant, measure(variant, options.steps, options.folder)) for variant in variants]
    print(table(rows))


def measure(variant: Variant, steps: int, folder: Path) -> dict[str, Any]:
    """Trains and evaluates one model, see `train_and_evaluate`."""
    settings = [f"experiment.model_cls = @{MODELS[variant.direction]}"]
    settings += ATTENTION[variant.attention]
    return train_and_evaluate(folder / variant.folder, settings, steps, variant.seed, SETS)


def train_and_evaluate(
    run: Path, settings: Sequence[str], steps: int, seed: int, sets: Mapping[str, str]
) -> dict[str, Any]:
    """Trains and evaluates one model of the demo's size on the demo's corpus.

    Args:
      run: The run's folder.
      settings: Lines of gin after those of the demo.
      steps: Of training.
      seed: Of parameters and data.
      sets: Bundled files to evaluate on, by name.

    Returns:
      The evaluation by the names of `sets`, and ``minutes`` of training.

    Raises:
      RuntimeError: If a command fails.
    """
    from fast_attention.protein_lm.data.corpus import bundled_corpus, bundled_splits

    warmup = min(60, max(1, steps // 10))
    common = [
        f"FlaxModel.random_seed = {seed}",
        f"experiment.data_seed = {seed}",
        f"experiment.max_train_steps = {steps}",
        f"experiment.eval_frequency = {steps}",
        f"experiment.checkpoint_frequency = {min(200, steps)}",
        "experiment.num_samples = 0",
        f"create_learning_rate_scheduler.warmup_steps = {warmup}",
    ]
    files = [
        f"--fasta={bundled_corpus('train')}",
        f"--valid_fasta={bundled_corpus('valid')}",
        f"--test_fasta={bundled_corpus('tiny')}",
    ]
    if not (run / "result.json").exists():
        run_command(
            "train",
            f"--gin_file={_CONFIG}",
            f"--work_dir={run}",
            *files,
            *(f"--gin_bindings={setting}" for setting in (*common, *settings)),
        )
    for name, split in sets.items():
        output = evaluation_file(run, name)
        if not output.exists():
            run_command(
                "evaluate",
                f"--run_dir={run}",
                f"--fasta={bundled_corpus(split)}",
                f"--split_file={bundled_splits()}",
                f"--output={output}",
            )
    return read_figures(run, sets)


def evaluation_file(run: Path, name: str) -> Path:
    """Where the evaluation of a run on one of the sets is."""
    return run / f"evaluation-{name}.json"


def read_figures(run: Path, sets: Iterable[str]) -> dict[str, Any]:
    """Returns what `train_and_evaluate` returned for a finished run."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    found = {
        name: json.loads(evaluation_file(run, name).read_text(encoding="utf-8")) for name in sets
    }
    return found | {"minutes": result["seconds"] / 60}


def run_command(*arguments: str) -> None:
    """Runs ``protein-lm`` with these arguments in this process; it prints to stderr.

    Raises:
      RuntimeError: If the command fails.
    """
    from fast_attention.protein_lm import cli

    # On stdout there is only the table.
    with contextlib.redirect_stdout(sys.stderr):
        status = cli.main(arguments)
    if status:
        raise RuntimeError(f"protein-lm {' '.join(arguments)} ended with status {status}")


def mean_and_error(numbers: Sequence[float], sign: str = "") -> str:
    """``mean ± standard error``, or the only number, or nothing."""
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):{sign}.3f}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(numbers) / math.sqrt(len(numbers)):.3f}"


def table(rows: Sequence[tuple[Variant, dict[str, Any]]]) -> str:
    """The table as Markdown, perplexities with their standard errors over groups of relatives."""
    lines = [
        "| | model | " + " | ".join(f"{name}, perplexity | accuracy" for name in SETS) + " | min |",
        "| --- | --- | " + "---: | " * (2 * len(SETS) + 1),
    ]
    for variant, found in rows:
        cells = []
        for name in SETS:
            score = found[name]["scores"][0]
            cells.append(f"{score['perplexity']:.2f} ± {score['perplexity_error']:.2f}")
            cells.append(f"{100 * score['accuracy']:.2f} %")
        seed = f", seed {variant.seed}" if variant.seed else ""
        cells.append(f"{found['minutes']:.1f}")
        lines.append(f"| {variant.direction} | {variant.attention}{seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
