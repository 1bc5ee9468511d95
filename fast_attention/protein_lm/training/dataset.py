"""A folder of files as training and validation data, and batches, as Google's protein_lm has them.

Shape letters: B rows, L row length.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_attention.protein_lm.data.corpus import Corpus
from fast_attention.protein_lm.data.domains import DiscreteDomain, make_protein_domain
from fast_attention.protein_lm.data.fasta import fasta_paths
from fast_attention.protein_lm.files.text_source import FastaError
from fast_attention.protein_lm.modeling import pipeline
from fast_attention.protein_lm.modeling.batches import as_corpus

if TYPE_CHECKING:
    import grain


def get_train_valid_files(
    directory: str | os.PathLike[str], num_test_files: int = 10, num_valid_files: int = 1
) -> tuple[list[str], list[str]]:
    """Divides the files of a folder, in the order of their names.

    The first `num_test_files` are set aside, the next `num_valid_files` are for validation, and all
    others are for training. Files with ``tmp`` in their names are ignored.

    Args:
      directory: A folder of FASTA files, see `fasta_paths`.
      num_test_files: Number of files to set aside.
      num_valid_files: Number of files for validation.

    Returns:
      The files to train on and those to validate on.

    Raises:
      FastaError: If the folder cannot be read, or has no FASTA file.
      ValueError: If a number is negative, or no file is left to train on.
    """
    for name, number in (("num_test_files", num_test_files), ("num_valid_files", num_valid_files)):
        if number < 0:
            raise ValueError(f"get_train_valid_files.{name} must be 0 or more; got {number}")
    if not Path(directory).is_dir():
        raise FastaError(f"{os.fspath(directory)}: is no folder. Give one of FASTA files.")
    files = [str(path) for path in fasta_paths(directory) if "tmp" not in Path(path).name]
    first = num_test_files + num_valid_files
    if len(files) <= first:
        raise ValueError(
            f"{os.fspath(directory)} has {len(files)} FASTA files, of which "
            f"get_train_valid_files.num_test_files = {num_test_files} are set aside and "
            f"get_train_valid_files.num_valid_files = {num_valid_files} are for validation: none "
            "is left to train on: lower these, or name the files by experiment.train_files"
        )
    return files[first:], files[num_test_files:first]


def batch_ds(
    ds: Any,
    length: int = 512,
    batch_size: int = 32,
    shuffle_buffer: int | None = 8192,
    pack_length: int | None = None,
    *,
    domain: DiscreteDomain | None = None,
    num_epochs: int | None = 1,
    seed: int = 0,
    **options: Any,
) -> grain.IterDataset[pipeline.Batch]:
    """Crops, shuffles and batches sequences; `FlaxModel.fit` takes the result.

    Args:
      ds: FASTA files, a `Corpus`, a dict of weights (see `data.make_dataset`), or a list of rows of
        ids.
      length: Maximum number of tokens of a sequence.
      batch_size: B.
      shuffle_buffer: Whether to shuffle in each epoch: None or 0 keeps the order, and any other
        number shuffles all sequences.
      pack_length: L, the length of rows with several sequences; None gives each sequence its own
        row of `length`.
      domain: Gives the vocabulary; None is `make_protein_domain`.
      num_epochs: Number of passes through the sequences; None repeats forever.
      seed: Random seed.
      **options: Options of `data.make_dataset`.

    Raises:
      FastaError: If a file cannot be read.
      ValueError: As `data.make_dataset`.
    """
    domain = make_protein_domain() if domain is None else domain
    if not isinstance(ds, (str, os.PathLike, dict, Corpus)) and not _are_paths(ds):
        ds = as_corpus(ds, domain)
    settings: dict[str, Any] = {"pack": pack_length is not None} | options
    return pipeline.make_dataset(
        ds,
        domain,
        length=length,
        batch_size=batch_size,
        seed=seed,
        shuffle=bool(shuffle_buffer),
        num_epochs=num_epochs,
        row_length=pack_length,
        **settings,
    )


def _are_paths(ds: Any) -> bool:
    return isinstance(ds, (list, tuple)) and all(
        isinstance(item, os.PathLike) or (isinstance(item, str) and Path(item).exists())
        for item in ds
    )
