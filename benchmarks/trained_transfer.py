"""What models that ``protein-lm linearize`` made predict, beside the exact model.

``python -m benchmarks.trained_transfer --exact=RUN --linear RUN.. --fasta=FILE`` hides 15 % of the
residues as :mod:`.trained_model` does and prints two tables: accuracy and perplexity of each model,
with a window also without the window and without the features; and errors of layers, before and
after attention transfer, as ``linearize.json`` has them. docs/trained-models.md has the commands
before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from benchmarks.trained_model import MASKED, masked_batches, measure, read_sequences
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.linearize import measuring
from fast_attention.protein_lm.linearize.report import STAGES, read_report
from fast_attention.protein_lm.linearize.run import RESULT
from fast_attention.protein_lm.loading import load_run


def versions(linear: FlaxModel, report: dict[str, Any]) -> dict[str, FlaxModel]:
    """The model, and where it has a window, the model without one of its two parts."""
    last = next(name for name in ("finetune", "transfer", "before") if name in report["found"])
    found = {last: linear}
    if report["attention"].get("exact_window") is not None:
        found["window_off"] = measuring.without_window(linear)
        found["features_off"] = measuring.without_features(linear)
    return found


def predict(model: FlaxModel, batches: Sequence[Any]) -> tuple[float, float]:
    """Share of masked residues predicted, and the perplexity of them."""
    module = nnx.merge(model.graphdef, model.weights, model.state.variables)
    found = measure(module, batches)
    jax.clear_caches()
    return found


def layer_table(reports: dict[str, dict[str, Any]]) -> str:
    """Errors of layers, a column a model and stage."""
    columns = {
        f"{name}, {STAGES[stage]}": report["found"][stage]["errors"]
        for name, report in reports.items()
        for stage in ("before", "transfer", "finetune")
        if stage in report["found"]
    }
    lines = [f"| layer | {' | '.join(columns)} |", "| ---: |" + " ---: |" * len(columns)]
    rows = zip(*columns.values(), strict=True)
    lines += [
        f"| {number} | {' | '.join(f'{error:.3f}' for error in errors)} |"
        for number, errors in enumerate(rows, 1)
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trained_transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--exact", required=True, help="folder of the exact model")
    parser.add_argument(
        "--linear", type=Path, nargs="+", required=True, help="folders that linearize wrote"
    )
    parser.add_argument("--fasta", type=Path, required=True, help="sequences nothing trained on")
    parser.add_argument("--sequences", type=int, default=100, help="how many (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        exact = load_run(options.exact).model
        linear = {path.name: load_run(path).model for path in options.linear}
        reports = {
            path.name: read_report(path / RESULT, exact.config.num_layers)
            for path in options.linear
        }
    except RunError as error:
        raise SystemExit(str(error)) from None
    sequences = read_sequences(options.fasta, options.sequences)
    batches = masked_batches(sequences, exact.domain.vocab.ids, MASKED, 0)
    count = sum(int(hidden.sum()) for _, _, hidden in batches)
    print(f"{len(sequences)} sequences, {count:,} masked residues\n")
    print("| model | stage | accuracy, % | perplexity |\n| --- | --- | ---: | ---: |")

    def show(name: str, stage: str, model: FlaxModel) -> None:
        accuracy, perplexity = predict(model, batches)
        print(f"| {name} | {stage} | {100 * accuracy:.1f} | {perplexity:.3f} |", flush=True)

    show("exact", "", exact)
    for name, model in linear.items():
        for stage, version in versions(model, reports[name]).items():
            show(name, STAGES[stage], version)
    print(f"\n{layer_table(reports)}")


if __name__ == "__main__":
    main()
