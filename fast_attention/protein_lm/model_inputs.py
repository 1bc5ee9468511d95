"""Proteins of FASTA files, as far as a model can read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from fast_attention.protein_lm.fasta import FastaRecord
from fast_attention.protein_lm.fasta_files import FastaPaths, read_proteins
from fast_attention.protein_lm.fasta_parser import MAX_RESIDUES
from fast_attention.protein_lm.run_folder import RunError
from fast_attention.protein_lm.skipped_records import SkippedRecords

if TYPE_CHECKING:
    from fast_attention.protein_lm.flax_model import FlaxModel


class Done(NamedTuple):
    """What was made of the proteins of some files.

    Attributes:
      proteins: How many there were.
      residues: How many of their residues were read by the model.
      longer: How many proteins have more residues than the model's domain.
      computed: Residues of this call, without those that an earlier one had computed.
    """

    proteins: int
    residues: int
    longer: int
    computed: int


def read_for_model(
    model: FlaxModel,
    paths: FastaPaths,
    *,
    room: int | None,
    max_length: int | None = None,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
    unique_ids: bool = False,
) -> Iterator[FastaRecord]:
    """Reads proteins one by one that a model has letters and room for.

    Args:
      model: Whose letters may occur.
      paths: As for `read_proteins`.
      room: Most residues that the model can read; None is any number.
      max_length: To how many residues proteins will be cropped; None crops none.
      on_error: As for `read_proteins`. Of a protein that is too long, "raise" and "replace" raise.
      skipped: As for `read_proteins`.
      unique_ids: As for `read_proteins`.

    Raises:
      FastaError: As `read_proteins`.
      RunError: At a protein that is too long, or if a crop is.
    """
    if room is not None and max_length is not None and max_length > room:
        raise RunError(
            f"a crop to {max_length} residues does not fit into the model's learned positions, "
            f"which have room for {room}"
        )
    limit = room if max_length is None else None
    records = read_proteins(
        paths,
        alphabet=model.domain.vocab.symbols,
        on_error=on_error,
        skipped=skipped,
        unique_ids=unique_ids,
        max_residues=limit if on_error == "skip" and limit is not None else MAX_RESIDUES,
    )
    return records if limit is None else _check_each(records, limit)


def _check_each(records: Iterator[FastaRecord], limit: int) -> Iterator[FastaRecord]:
    for record in records:
        if len(record.sequence) > limit:
            raise RunError(
                f"protein {record.id!r} has {len(record.sequence)} residues, but the model's "
                f"learned positions have room for {limit}: crop proteins with --max_length={limit} "
                "(max_length in Python), leave long ones out with --on_error=skip, or train a "
                "model with FlaxModel.positions = 'rotary'"
            )
        yield record
