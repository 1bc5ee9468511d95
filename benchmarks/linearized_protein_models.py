"""What ``protein-lm linearize`` costs models of the demo's size that had exact attention.

``python -m benchmarks.linearized_protein_models`` trains models with exact attention on the demo's
corpus, one a seed, and linearizes each with several estimators, with and without a window of exact
weights, in equally many steps. The table has the perplexity on proteins of the split ``test``, less
that of the exact model of the same seed, averaged over seeds: before any training, after attention
transfer, after fine-tuning, and of the last model without its window and without its features. The
picture shows the same.

Models are ordinary folders of ``protein-lm``: what is finished is not made again, and the same
command resumes what was interrupted. ``--report`` makes nothing and prints what is finished.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import COLOURS, MARKERS, load_figure_class
from benchmarks.protein_models import mean_and_error, run_command, train_and_evaluate

ESTIMATORS = {
    "favor+": "FAVOR+",
    "wderf_s": "wderf_s",
    "hedgehog": "Hedgehog",
    "darkformer": "DARKFormer",
}
"""Names in the table, by those of ``--estimator``."""

STAGES = {
    "before": "not trained",
    "transfer": "after transfer",
    "finetune": "after fine-tuning",
    "window_off": "window off",
    "features_off": "features off",
}
"""Columns, by the names of ``linearize.json``."""

Found = Mapping[tuple[str, int | None], Mapping[int, Mapping[str, Any]]]
"""Parts ``found`` of ``linearize.json``, by estimator and window, then by seed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, linearizes, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linearized_protein_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=850, help="of training of exact models (%(default)s)")
    add("--transfer_steps", type=int, default=100, help="of attention transfer (%(default)s)")
    add("--finetune_steps", type=int, default=100, help="of fine-tuning (%(default)s)")
    add(
        "--finetune",
        choices=("none", "lora", "full"),
        default="lora",
        help="what to tune (%(default)s)",
    )
    add("--finetune_rate", type=float, help="of fine-tuning (that of protein-lm linearize)")
    add("--nb_features", type=int, default=64, help="(%(default)s)")
    add("--max_length", type=int, default=512, help="crop longer proteins (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of exact models (0 1 2)")
    add("--estimators", nargs="+", choices=tuple(ESTIMATORS), default=tuple(ESTIMATORS))
    add(
        "--windows",
        type=int,
        nargs="+",
        default=[0, 32],
        help="keys with exact weights; 0: no window (0 32)",
    )
    add("--proteins", type=int, default=220, help="of the split test (%(default)s)")
    add(
        "--folder", type=Path, default=Path("runs/linearized"), help="where models go (%(default)s)"
    )
    add("--picture", type=Path, help="PNG file to write")
    add("--report", action="store_true", help="make no model; print what is finished")
    options = parser.parse_args(arguments)
    found: dict[tuple[str, int | None], dict[int, Any]] = {
        (estimator, window or None): {}
        for window in options.windows
        for estimator in options.estimators
    }
    for seed in options.seeds:
        exact = options.folder / f"exact-{seed}"
        if not options.report:
            train_and_evaluate(exact, ["FlaxModel.attention_fn = None"], options.steps, seed, {})
        for (estimator, window), reports in found.items():
            if not options.report:
                linearize(options, exact, estimator, window, seed)
            report = _finished(_folder(options.folder, estimator, window, seed))
            if report is not None:
                reports[seed] = report
    print(make_table(found))
    if options.picture:
        draw_picture(found, options.picture)


def linearize(
    options: argparse.Namespace, exact: Path, estimator: str, window: int | None, seed: int
) -> None:
    """Makes one linear model of an exact one, unless it is finished."""
    from fast_attention.protein_lm.data.corpus import bundled_corpus

    run_command(
        "linearize",
        f"--run_dir={exact}",
        f"--work_dir={_folder(options.folder, estimator, window, seed)}",
        f"--fasta={bundled_corpus('train')}",
        f"--valid_fasta={write_test_proteins(options.folder, options.proteins)}",
        f"--estimator={estimator}",
        f"--nb_features={options.nb_features}",
        *([] if window is None else [f"--exact_window={window}"]),
        f"--transfer_steps={options.transfer_steps}",
        f"--finetune={options.finetune}",
        f"--finetune_steps={options.finetune_steps}",
        *([] if options.finetune_rate is None else [f"--finetune_rate={options.finetune_rate}"]),
        f"--max_length={options.max_length}",
        f"--seed={seed}",
    )


def write_test_proteins(folder: Path, number: int) -> Path:
    """Writes proteins of the split test, evenly spaced, to a file.

    Args:
      folder: Of the file.
      number: Of proteins.

    Returns:
      The file.
    """
    from fast_attention.protein_lm.data.corpus import bundled_corpus
    from fast_attention.protein_lm.data.fasta import read_fasta, write_fasta

    path = folder / f"test-{number}.fasta"
    if not path.exists():
        records = list(read_fasta(bundled_corpus("test")))
        chosen = [records[i * len(records) // number] for i in range(min(number, len(records)))]
        write_fasta(path, chosen)
    return path


def _folder(folder: Path, estimator: str, window: int | None, seed: int) -> Path:
    return folder / f"{estimator}{'' if window is None else f'-window-{window}'}-{seed}"


def _finished(folder: Path) -> Mapping[str, Any] | None:
    """What ``protein-lm linearize`` found, or None where it is not finished."""
    from fast_attention.protein_lm.linearize.report import read_report
    from fast_attention.protein_lm.linearize.run import RESULT
    from fast_attention.protein_lm.loading import load_run

    if not (folder / RESULT).exists():
        return None
    layers = load_run(str(folder)).model.config.num_layers
    return read_report(folder / RESULT, layers)["found"]


def differences(reports: Mapping[int, Mapping[str, Any]], stage: str) -> list[float]:
    """Perplexity at a stage less that of the exact model, for each seed that has both."""
    return [
        found[stage]["perplexity"] - found["exact"]["perplexity"]
        for found in reports.values()
        if stage in found
    ]


def make_table(found: Found) -> str:
    """Means and standard errors over seeds, as Markdown."""
    exact: dict[int, float] = {}
    for reports in found.values():
        exact |= {seed: report["exact"]["perplexity"] for seed, report in reports.items()}
    lines = [
        f"Perplexity of exact attention: {mean_and_error(list(exact.values()))}",
        "",
        f"| estimator | window | seeds | {' | '.join(STAGES.values())} |",
        f"| --- | ---: | ---: |{' ---: |' * len(STAGES)}",
    ]
    for (estimator, window), reports in found.items():
        if reports:
            cells = [mean_and_error(differences(reports, stage), "+") for stage in STAGES]
            start = f"| {ESTIMATORS[estimator]} | {window or ''} | {len(reports)} |"
            lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_picture(found: Found, path: Path) -> None:
    """Draws the loss of perplexity by stage; dashed lines have a window.

    Args:
      found: What was measured.
      path: Of the PNG file.

    Raises:
      SystemExit: Without matplotlib.
    """
    figure_class = load_figure_class("run the same command again; nothing is made twice.")
    figure = figure_class(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for (estimator, window), reports in found.items():
        losses = {
            stage: differences(reports, stage) for stage in ("before", "transfer", "finetune")
        }
        # Without learned features there is no transfer: it changes nothing.
        losses["transfer"] = losses["transfer"] or losses["before"]
        losses = {stage: values for stage, values in losses.items() if values}
        if not losses:
            continue
        place = list(ESTIMATORS).index(estimator)
        label = ESTIMATORS[estimator] + ("" if window is None else f", window of {window}")
        axes.plot(
            [STAGES[stage] for stage in losses],
            [statistics.mean(values) for values in losses.values()],
            color=COLOURS[place],
            marker=MARKERS[place],
            linestyle="-" if window is None else "--",
            label=label,
        )
    axes.axhline(0, color="#000000", linewidth=1)
    axes.set_yscale("symlog", linthresh=0.1)
    ticks = [0, 0.03, 0.1, 0.3, 1, 3, 10]
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    largest = max((max(line.get_ydata()) for line in axes.get_lines()), default=1)
    axes.set_ylim(-0.03, 1.3 * max(largest, 0.1))
    axes.set_ylabel("perplexity above exact attention")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
