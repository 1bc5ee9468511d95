"""``protein-lm train``."""

from __future__ import annotations

import argparse
import functools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.cli import arguments
from fast_attention.protein_lm.errors import UsageError

SUMMARY = "train a model, or resume its training"
DESCRIPTION = """\
Train a model and write it to a folder. The same command resumes an interrupted run from its last
checkpoint. On Ctrl-C and SIGTERM a checkpoint is saved first. Without --fasta, the model is trained
on the proteins included in the package.

  protein-lm train --gin_file=demo --work_dir=runs/demo
  protein-lm train --gin_file=demo --work_dir=runs/mine \\
      --fasta=family.fasta=3 --fasta=swissprot.fasta.gz --valid_fasta=held_out.fasta --epochs=5

Several machines can train one model: see docs/multi-process.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="gin file with settings, or the name of a gin file of the package, such as demo or "
        "lm_softmax; may be repeated (default: demo)",
    )
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="SETTING",
        help="one more setting, such as 'FlaxModel.num_layers = 4'; overrides the gin files; may "
        "be repeated",
    )
    parser.add_argument(
        "--work_dir", required=True, metavar="FOLDER", help="folder of the run; one folder per run"
    )
    parser.add_argument(
        "--fasta",
        action="append",
        metavar="PATH[=WEIGHT]",
        help="proteins to train on: a FASTA file, plain or gzip, or a folder of them; may be "
        "repeated. The share of a file in the training data is proportional to its weight "
        "(default weight: 1). Without any weights, files are weighted by size",
    )
    parser.add_argument(
        "--valid_fasta",
        action="append",
        metavar="PATH",
        help="proteins for validation during training; may be repeated. Without --valid_fasta and "
        "--test_fasta, 5 %% of the sequences of --fasta (at most 1,000) are held out for both",
    )
    parser.add_argument(
        "--test_fasta",
        action="append",
        metavar="PATH",
        help="proteins for evaluation at the end; may be repeated",
    )
    arguments.add_on_error_choice(parser, None)
    number = functools.partial(arguments.add_number, parser)
    number(
        "--steps",
        ranges.COUNT,
        "N",
        "number of training steps; a larger number continues a finished run (default: from the "
        "gin file)",
    )
    number(
        "--epochs",
        ranges.EPOCHS,
        "N",
        "number of passes through the proteins; the run ends with --epochs or --steps, whichever "
        "comes first; a larger number continues a finished run (default: from the gin file)",
    )
    number(
        "--batch_size",
        ranges.BATCH_SIZE,
        "N",
        "sequences per batch and device; lower it to save memory (default: from the gin file)",
    )
    parser.add_argument(
        "--new_data",
        action="store_true",
        help="resume a run even if its FASTA files have changed (otherwise an error)",
    )
    _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds what connects several processes."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command on every machine. All machines need access to the same --work_dir.",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="connect to the processes started by Slurm, Open MPI, Kubernetes or Cloud TPU",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="without a launcher: host of process 0 and a free port on it",
    )
    number = functools.partial(arguments.add_number, group)
    number("--num_processes", ranges.PROCESSES, "N", "total number of processes")
    number("--process_id", ranges.PROCESS, "I", "0-based index of this process")
    number(
        "--join_timeout",
        ranges.SECONDS,
        "SECONDS",
        "time to wait until all processes have connected (default: 300)",
        default=300,
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    with _processes(options):
        _train(options)


def _processes(options: argparse.Namespace) -> AbstractContextManager[None]:
    given = (options.coordinator, options.num_processes, options.process_id)
    if given == (None, None, None) and not options.distributed:
        return nullcontext()
    if options.distributed and given != (None, None, None):
        raise UsageError(
            "--distributed finds the other processes: give either --distributed or --coordinator, "
            "--num_processes and --process_id"
        )
    from fast_attention.protein_lm.distributed import processes
    from fast_attention.protein_lm.runs.run_folder import RunFolder

    def remedy() -> str:
        step = RunFolder(Path(options.work_dir)).newest_step()
        if step is None:
            return "There was no checkpoint yet: the same command starts from the beginning"
        return (
            f"The checkpoint of step {step} is complete, and the same command resumes from there, "
            "also with another number of processes or devices"
        )

    return processes.joined(*given, timeout=options.join_timeout, remedy=remedy)


def _train(options: argparse.Namespace) -> None:
    import gin

    from fast_attention.protein_lm import gin_registry
    from fast_attention.protein_lm.distributed import processes
    from fast_attention.protein_lm.files.output_files import check_output_folder
    from fast_attention.protein_lm.runs.run_folder import RunFolder
    from fast_attention.protein_lm.training import train

    if not RunFolder(Path(options.work_dir)).result.exists():
        check_output_folder(options.work_dir)
    chosen = {
        "train_files": options.fasta and read_weights(options.fasta),
        "valid_files": options.valid_fasta,
        "test_files": options.test_fasta,
        "max_train_steps": options.steps,
        "epochs": options.epochs,
        "batch_size_per_device": options.batch_size,
    }
    bindings = [
        f"experiment.{name} = {value!r}" for name, value in chosen.items() if value is not None
    ]
    if options.on_error:
        bindings.append(f"experiment.on_error = {options.on_error!r}")
    settings = options.gin_file
    if not settings:
        settings = [gin_registry.DEMO]
        processes.note(f"no --gin_file: the settings are those of {gin_registry.DEMO}")
    gin_registry.configure(settings, options.gin_bindings + bindings)
    experiment = gin.get_configurable("experiment")(new_data=options.new_data)
    train.run_experiment(options.work_dir, experiment)


def read_weights(given: list[str]) -> list[str] | dict[str, float]:
    """Tells files from weights: ``a.fasta=2`` is the file ``a.fasta`` of weight 2.

    A file whose whole name ends in that way is taken to be meant as it is.

    Returns:
      The files where there is no weight, else a dict from all files to weights, 1 by default.

    Raises:
      ValueError: If a file with weights was given twice, or a weight is out of its range.
    """
    found: list[tuple[str, str]] = []
    for text in given:
        name, _, number = text.rpartition("=")
        has_weight = name and _is_number(number) and not Path(text).exists()
        found.append((name, number) if has_weight else (text, ""))
    if not any(number for _, number in found):
        return given
    weights = {name: float(number or 1) for name, number in found}
    for name, weight in weights.items():
        ranges.check(f"the weight of --fasta={name}", weight, ranges.WEIGHT)
    if len(weights) < len(found):
        raise UsageError(f"with weights, each file can be given once; got --fasta {given}")
    return weights


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
