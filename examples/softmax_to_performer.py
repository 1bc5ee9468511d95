"""Makes Performers of a Transformer trained with exact attention, and trains them a little further.

A small causal protein model is trained with softmax attention (or taken from --run). Then its
attention function is exchanged, and nothing else: the parameters are the same. For each function
this tells the error of each layer and the validation loss as they are after the exchange and once
the random features are calibrated on training proteins, and the loss in the course of some steps
of training. The exact model is trained for the same steps on the same batches, so that what
training alone brings is seen, too.

    python -m examples.softmax_to_performer --output runs/softmax_to_performer

The folder gets JSON files for each function (what is there is not computed again), tables
(tables.md) and a picture (recovery.png).

Reference: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794, section 4.3
(backward compatibility).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fast_attention import layers, make_fast_softmax_attention
from fast_attention.protein_lm import cli
from fast_attention.protein_lm.data.corpus import bundled_corpus
from fast_attention.protein_lm.files.output_files import write_file
from fast_attention.protein_lm.modeling import pipeline
from fast_attention.protein_lm.modeling.schedules import create_learning_rate_scheduler
from fast_attention.protein_lm.models import FlaxLM

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


def train_exact(folder: Path, options: argparse.Namespace) -> None:
    """Trains a model with exact attention; a finished run stays as it is.

    Args:
      folder: Where the run goes.
      options: Of the command.

    Raises:
      RuntimeError: If training fails.
    """
    steps = options.exact_steps
    warmup = max(1, steps // 10)
    bindings = [
        "FlaxModel.attention_fn = None",
        f"experiment.max_train_steps = {steps}",
        f"experiment.eval_frequency = {steps}",
        f"experiment.checkpoint_frequency = {min(200, steps)}",
        "experiment.num_samples = 0",
        f"create_learning_rate_scheduler.warmup_steps = {warmup}",
    ]
    status = cli.main(
        [
            "train",
            f"--gin_file={options.gin_file}",
            f"--work_dir={folder}",
            f"--fasta={options.fasta}",
            f"--valid_fasta={options.valid_fasta}",
            *(f"--gin_bindings={binding}" for binding in bindings),
        ]
    )
    if status:
        raise RuntimeError(f"the training of {folder} ended with status {status}")


def proteins(model: FlaxLM, fasta: Any, seed: int, options: argparse.Namespace) -> Iterator[Any]:
    """Batches of packed proteins, the same for every model."""
    return iter(
        pipeline.make_dataset(
            str(fasta),
            model.domain,
            length=options.length,
            batch_size=options.rows,
            seed=seed,
            pack=True,
        )
    )


def validation(model: FlaxLM, options: argparse.Namespace) -> list[Any]:
    """The batches that losses and errors are told of."""
    found = proteins(model, options.valid_fasta, 7, options)
    return list(itertools.islice(found, options.valid_batches))


def switch(exact: FlaxLM, name: str, options: argparse.Namespace) -> Iterator[tuple[str, FlaxLM]]:
    """Exchanges the attention function of a model, then calibrates the new one.

    Args:
      exact: The trained model.
      name: A key of `VARIANTS`.
      options: Of the command.

    Yields:
      "switched" and the model, then "calibrated" and the same model, if there is what to calibrate.
    """
    given = VARIANTS[name]
    attention_fn = None if given is None else make_fast_softmax_attention(**given)
    warmup = create_learning_rate_scheduler(
        "constant * linear_warmup", options.learning_rate, warmup_steps=10
    )
    model = exact.with_attention(attention_fn, learning_rate=warmup)
    yield "switched", model
    if attention_fn is not None and attention_fn.calibration == "stored":
        found = proteins(exact, options.fasta, 1, options)
        model.calibrate(found, num_batches=options.calibration)
        yield "calibrated", model


def measure_losses(exact: FlaxLM, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Validation losses after the exchange, after calibration, and while training goes on.

    Returns:
      ``switched``; ``calibrated`` for features with stored parameters; ``curve``, pairs of a step
      and the loss, from what came before training on.
    """
    valid = validation(exact, options)
    result: dict[str, Any] = {}
    model, loss = exact, np.nan
    for stage, model in switch(exact, name, options):
        loss = result[stage] = model.evaluate(valid)["loss"]
        print(f"{name}, {stage}: {loss:.4f}", flush=True)
    step, curve = 0, [(0, loss)]
    batches = proteins(exact, options.fasta, 2, options)
    while step < options.steps:
        more = min(options.every, options.steps - step)
        model.fit(batches, max_steps=more)
        step, loss = step + more, model.evaluate(valid)["loss"]
        curve.append((step, loss))
        print(f"{name}, step {step}: {loss:.4f}", flush=True)
    return result | {"curve": curve}


def measure_layers(exact: FlaxLM, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Errors of every layer and head, each on what the layers before make of the input.

    Returns:
      By stage ``output``, errors ``[layers][heads]`` against exact attention, and ``uniform``,
      those that equal weights on all keys have.
    """
    batch = validation(exact, options)[0]
    positions, segment_ids = batch["positions"], batch["segment_ids"]
    result: dict[str, Any] = {}
    for stage, model in switch(exact, name, options):

        @jax.jit
        def sums(parameters: Any, variables: Any, graphdef: Any = model.graphdef) -> Any:
            return layers.fidelity_sums(
                nnx.merge(graphdef, parameters, variables),
                batch["inputs"],
                positions=positions,
                segment_ids=segment_ids,
                key_mask=segment_ids > 0,
            )

        found = layers.summarize_fidelity(sums(model.weights, model.state.variables))
        result[stage] = {
            kind: [getattr(layer, kind).tolist() for layer in found]
            for kind in ("output", "uniform")
        }
    return result


def tables(losses: Mapping[str, Any], errors: Mapping[str, Any]) -> str:
    """The results as two tables in Markdown."""
    exact = dict(losses[EXACT]["curve"])
    marks = sorted({step for step in exact if step} & {max(exact) // 2, max(exact)})
    after = " | ".join(f"after {step} steps | exact then" for step in marks)
    lines = [
        f"| attention | switched | calibrated | {after} |",
        "|---|---|---|" + "---|---|" * len(marks),
    ]
    for name, found in losses.items():
        curve = dict(found["curve"])
        told = [found["switched"], found.get("calibrated")]
        for step in marks:
            told += [curve.get(step), exact[step]]
        cells = ["" if x is None else f"{x:.4f}" for x in told]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    number = max((len(found["switched"]["output"]) for found in errors.values()), default=0)
    heads = " | ".join(f"layer {i + 1}" for i in range(number))
    lines += ["", f"| attention | {heads} |", "|---|" + "---|" * number]
    rows: dict[str, Any] = {}
    for name, stages in errors.items():
        rows |= {f"{name}, {stage}": found["output"] for stage, found in stages.items()}
        rows["equal weights"] = stages["switched"]["uniform"]
    for name, found in sorted(rows.items(), key=lambda row: row[0] == "equal weights"):
        means = [np.sqrt(np.mean(np.square(layer))) for layer in found]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def draw(losses: Mapping[str, Any], path: Path) -> None:
    """Draws validation losses over steps of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, found in losses.items():
        steps, values = zip(*found["curve"], strict=True)
        style: Any = {"color": "black", "linestyle": "--"} if name == EXACT else {}
        line = axes.plot(steps, values, marker=".", label=name, **style)[0]
        if "calibrated" in found:
            axes.plot(0, found["switched"], marker="x", color=line.get_color())
    axes.set_xlabel("steps of training after the exchange (x: not calibrated)")
    axes.set_ylabel("validation loss, nats per residue")
    axes.legend()
    figure.savefig(path, dpi=110)


def _once(path: Path, measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What was measured before, or is now."""
    if not path.exists():
        write_file(path, json.dumps(measure(*given), indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


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
    add("--gin_file", type=Path, default=_CONFIG, help="the model of that")
    add("--exact_steps", type=int, default=400, help="training steps of that")
    add("--fasta", default=str(bundled_corpus("train")), help="proteins to train on")
    add("--valid_fasta", default=str(bundled_corpus("valid")), help="proteins to validate on")
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    add("--steps", type=int, default=200, help="training steps after the exchange")
    add("--every", type=int, default=25, help="steps between two validations")
    add("--learning_rate", type=float, default=3e-4, help="of these steps, after 10 of warmup")
    add("--length", type=int, default=512, help="tokens of a row")
    add("--rows", type=int, default=8, help="rows of a batch")
    add("--valid_batches", type=int, default=6, help="batches of validation")
    add("--calibration", type=int, default=4, help="batches to calibrate on")
    options = parser.parse_args(arguments)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    run = options.run or output / "exact_run"
    if options.run is None:
        train_exact(run, options)
    exact = FlaxLM.load(run)
    losses: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for name in dict.fromkeys([EXACT, *options.variants]):
        stem = name.replace(", ", "-").replace(" ", "-")
        losses[name] = _once(output / f"{stem}.json", measure_losses, exact, name, options)
        if name != EXACT:
            path = output / f"{stem}-layers.json"
            errors[name] = _once(path, measure_layers, exact, name, options)
    write_file(output / "tables.md", tables(losses, errors))
    draw(losses, output / "recovery.png")
    print((output / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
