"""The progress bar and the final report of a command that reads many proteins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fast_attention.protein_lm.flax_model import FlaxModel
    from fast_attention.protein_lm.inference.partial_work import Done


@contextlib.contextmanager
def residue_bar(title: str) -> Iterator[Callable[[int], None]]:
    """Shows a bar on stderr, if that is a terminal, and gives a function that moves it."""
    from tqdm import tqdm

    # The total is unknown until the file, which is read once, has been read.
    with tqdm(desc=title, unit=" residues", unit_scale=True, disable=None) as bar:

        def advance(residues: int) -> None:
            bar.update(residues)

        yield advance


def report(model: FlaxModel, done: Done, seconds: float, output: str, *others: str | None) -> None:
    """Prints what was done; `others` are further outputs of the command."""
    from fast_attention.protein_lm.files.output_targets import status_stream
    from fast_attention.protein_lm.wording import counted, place

    status = status_stream(output, *others)
    print(
        f"{counted(done.proteins, 'protein')}, {counted(done.residues, 'residue')}, "
        f"{done.computed / seconds:,.0f} residues/s, written to {place(output)}",
        file=status,
    )
    if done.computed < done.residues:
        before = counted(done.residues - done.computed, "residue")
        print(f"{before} of these had been computed before the interruption", file=status)
    if done.longer:
        print(
            f"of {counted(done.longer, 'protein')} more than {model.domain.length:,} residues were "
            "read, the length that the model was made for: it has not been trained on longer ones",
            file=status,
        )
