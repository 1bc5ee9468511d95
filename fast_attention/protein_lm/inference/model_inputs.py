"""Proteins of FASTA files, as far as a model can read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.fasta import FastaPaths, FastaRecord, read_proteins
from fast_attention.protein_lm.data.fasta_parser import MAX_RESIDUES
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.machine_failures import OUT_OF_MEMORY, machine_failure
from fast_attention.protein_lm.modeling.encoding import longest_protein
from fast_attention.protein_lm.wording import counted

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

CROP = (
    "use the first N residues with --max_length=N (max_length in Python), or leave long proteins "
    "out with --on_error=skip"
)
CUT = "cut out the part that matters"
"""In place of `CROP`, for commands that do not crop."""

_ID_BYTES_PER_TOKEN = 64


def read_for_model(
    model: BuiltModel,
    paths: FastaPaths,
    *,
    max_length: int | None = None,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
    unique_ids: bool = False,
    crop: str = CROP,
) -> Iterator[FastaRecord]:
    """Reads proteins one by one that a model has letters and room for.

    Args:
      model: Whose letters may occur.
      paths: As for `read_proteins`.
      max_length: To how many residues proteins will be cropped. None crops none, and a record of
        more than `Alphabet.longest` residues is an error.
      on_error: As for `read_proteins`. Of a protein that is too long, "raise" and "replace" raise.
      skipped: As for `read_proteins`.
      unique_ids: As for `read_proteins`.
      crop: What an error about a longer record recommends.

    Raises:
      FastaError: As `read_proteins`, and at a protein that is too long.
      RunError: If a crop does not fit into the model.
    """
    room = longest_protein(model)
    if room is not None and max_length is not None and max_length > room:
        raise RunError(
            f"a crop to {max_length} residues does not fit into the model's learned positions, "
            f"which have room for {room}"
        )
    limit, remedy = MAX_RESIDUES, None
    if max_length is None:
        limit, remedy = longest_record(model.domain.vocab, room, crop)
    return read_proteins(
        paths,
        alphabet=model.domain.vocab,
        on_error=on_error,
        skipped=skipped,
        unique_ids=unique_ids,
        max_residues=limit,
        too_long=remedy,
    )


def longest_record(
    alphabet: Alphabet, room: int | None = None, crop: str = CROP
) -> tuple[int, str]:
    """The most residues of a record that is read whole, and what to do with a longer one.

    Args:
      alphabet: Of the model.
      room: Most residues that the model can read; None is any number.
      crop: How the caller crops proteins.
    """
    if room is not None and room < alphabet.longest:
        return room, (
            f"The model's learned positions have room for {room}: "
            f"{crop.replace('the first N', f'the first {room}').replace('=N', f'={room}')}. "
            "Models with rotary positions have no such limit."
        )
    return alphabet.longest, (
        f"At most {alphabet.longest:,} are expected: check that this is no genome and that each "
        f"protein has a header of its own, or {crop}."
    )


def record_cost(name: str) -> int:
    """Tokens as which the id of a record counts, so that very long ids fill a window, too."""
    return len(name) // _ID_BYTES_PER_TOKEN


@contextlib.contextmanager
def naming_the_longest(
    ids: Sequence[str],
    lengths: Sequence[int],
    remedy: str = "take a smaller --tokens_per_batch, or use the first N residues with "
    "--max_length=N",
) -> Iterator[None]:
    """Names the longest of some proteins where they need more memory than there is.

    Args:
      ids: Of the proteins.
      lengths: Their residues.
      remedy: What to do.

    Raises:
      RunError: In place of an error for lack of memory.
    """
    try:
        yield
    except Exception as error:
        if machine_failure(error) != OUT_OF_MEMORY:
            raise
        longest = max(range(len(ids)), key=lengths.__getitem__)
        raise RunError(
            f"out of memory at a group of {counted(len(ids), 'protein')}, the longest of which is "
            f"{ids[longest][:100]!r} with {counted(lengths[longest], 'residue')}: {remedy} "
            f"({next(iter(str(error).splitlines()), 'MemoryError')[:200]})"
        ) from error
