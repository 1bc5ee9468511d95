"""The progress and the final report of a command that reads many proteins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fast_attention.protein_lm import messages

if TYPE_CHECKING:
    from fast_attention.protein_lm.flax_model import FlaxModel
    from fast_attention.protein_lm.inference.partial_work import Done


@contextlib.contextmanager
def residue_bar(title: str) -> Iterator[Callable[[int], None]]:
    """Shows progress on stderr, see `messages.progress`; gives a function that moves it."""
    # The total is unknown until the file, which is read once, has been read.
    with messages.progress(title, "residues") as bar:

        def advance(residues: int) -> None:
            bar.update(residues)

        yield advance


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
            f"of {counted(done.longer, 'protein')} more than {model.domain.length:,} residues were "
            "read, the length that the model was made for: it has not been trained on longer ones",
            status,
        )
