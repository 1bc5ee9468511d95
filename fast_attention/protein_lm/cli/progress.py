"""The progress and the final report of a command that reads many proteins."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.cli import arguments

if TYPE_CHECKING:
    from fast_attention.protein_lm.flax_model import FlaxModel
    from fast_attention.protein_lm.inference.partial_work import Done


def process_proteins(
    options: argparse.Namespace,
    title: str,
    compute: Callable[..., Done],
    *,
    unique_ids: bool = False,
) -> None:
    """Runs a command that makes one file of the proteins of ``--fasta``, and that can be resumed.

    Args:
      options: Of the command.
      title: Of the progress.
      compute: Called with the model, the records, and ``origin`` and ``progress`` by name.
      unique_ids: Whether each protein needs an id of its own.
    """
    from fast_attention.protein_lm.inference.model_inputs import read_for_model
    from fast_attention.protein_lm.loading import load_run

    arguments.check_files(options, "output", "skipped_list")
    model, step, _ = load_run(options.run_dir, gin_file=options.gin_file)
    began = time.perf_counter()
    # The total is unknown until the file, which is read once, has been read.
    progress = messages.progress(title, "residues")
    with arguments.skipped_records(options) as skipped, progress as bar:
        records = read_for_model(
            model,
            options.fasta,
            max_length=options.max_length,
            on_error=options.on_error,
            skipped=skipped,
            unique_ids=unique_ids,
        )
        done = compute(model, records, origin={"step": step}, progress=bar.update)
    report(model, done, time.perf_counter() - began, options.output, options.skipped_list)


def report(model: FlaxModel, done: Done, seconds: float, output: str, *others: str | None) -> None:
    """Prints what was done; `others` are further outputs of the command."""
    from fast_attention.protein_lm.files.output_targets import status_stream
    from fast_attention.protein_lm.wording import counted, place

    status = status_stream(output, *others)
    messages.note(
        f"{counted(done.proteins, 'protein')}, {counted(done.residues, 'residue')}, "
        f"{done.computed / seconds:,.0f} residues/s, written to {place(output)}",
        status,
    )
    if done.computed < done.residues:
        before = counted(done.residues - done.computed, "residue")
        messages.note(f"{before} of these had been computed before the interruption", status)
    if done.longer:
        messages.note(
            f"of {counted(done.longer, 'protein')} more than {model.domain.length:,} residues "
            "were read: the model was not trained on such long proteins",
            status,
        )
