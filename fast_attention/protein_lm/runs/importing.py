"""Published ESM-2 and BERT models as folders that every command reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fast_attention.models.config import TransformerConfig
from fast_attention.models.originals.pretrained import load_pretrained
from fast_attention.protein_lm.data.alphabet import FASTA_SYMBOLS, Alphabet
from fast_attention.protein_lm.data.alphabets import ESM
from fast_attention.protein_lm.data.domains import VariableLengthDiscreteDomain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import one_line, read_bounded, shown
from fast_attention.protein_lm.machine_failures import machine_failure
from fast_attention.protein_lm.modeling.train_state import split_model
from fast_attention.protein_lm.models import FlaxBERT
from fast_attention.protein_lm.runs.exporting import check_export, save_arrays
from fast_attention.protein_lm.runs.run_folder import RunFolder

MAX_VOCABULARY = 2**20
"""Bytes of the longest ``vocab.txt`` that is read."""
UNLIMITED = 1024
"""The most residues of the domain of a model whose positions have no limit."""

_SPECIAL = {
    "bos_token": ("<cls>", "[CLS]"),
    "eos_token": ("<eos>", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]"),
    "mask_token": ("<mask>", "[MASK]"),
}
_RARE = "XBUZOJ"
_GAPS = ".-"


class Imported(NamedTuple):
    """What was imported.

    Attributes:
      model: As it was described; its state is not made.
      other_heads: Names of arrays of other heads, which are left out.
    """

    model: FlaxBERT
    other_heads: list[str]


def import_model(path: str | Path, output: str | Path) -> Imported:
    """Writes a published model to a folder of this package. Nothing in its files is executed.

    Args:
      path: See `fast_attention.models.load_pretrained`; a folder needs ``vocab.txt``, too.
      output: The new folder, see `exporting.save_arrays`.

    Raises:
      OutputError: If the folder cannot be written.
      RunError: If the folder holds something else; if the model cannot be read, or reads other
        sequences than those of single letters.
    """
    path = Path(path)
    check_export(None, RunFolder(Path(output)))
    if path.is_dir() and Path(output).exists() and path.samefile(output):
        raise RunError(f"{output} is the published model: give the new model a folder of its own")
    try:
        found = load_pretrained(path)
    except (OSError, MemoryError) as error:
        remedy = machine_failure(error) or "check the path"
        raise RunError(f"{path} cannot be read ({one_line(error)}): {remedy}") from error
    except ValueError as error:
        raise RunError(one_line(error)) from error
    config = found.model.config
    alphabet = ESM if path.is_file() else _read_alphabet(path, config.vocab_size)
    if len(alphabet) != config.vocab_size:
        raise RunError(
            f"{path} has {config.vocab_size} embeddings, and its alphabet {len(alphabet)} tokens"
        )
    if path.is_dir():
        _check_ids(path, found.description, alphabet)
    model = _describe(config, alphabet)
    _, parameters, variables = split_model(found.model)
    save_arrays(model, parameters, variables, output)
    return Imported(model, found.other_heads)


def _describe(config: TransformerConfig, alphabet: Alphabet) -> FlaxBERT:
    """The untrained model of a description."""
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("vocab_size", "causal", "max_len")
    }
    length = UNLIMITED
    if config.positions == "learned":
        # Two of the positions are those of the begin and the end token.
        length = config.max_len - 2
    domain = VariableLengthDiscreteDomain(alphabet, length)
    # Given here, so that a binding of a gin configuration does not replace exact attention.
    return FlaxBERT(domain, enclose=True, max_len=length, attention_fn=None, **fields)


def _check_ids(folder: Path, described: dict[str, Any], alphabet: Alphabet) -> None:
    """Compares the ids that both files name: vocab.txt may be that of another model."""
    for name, own in (("pad_token_id", alphabet.pad), ("mask_token_id", alphabet.mask)):
        if described.get(name) not in (None, own):
            raise RunError(
                f"{folder / 'vocab.txt'} does not fit config.json: {name} is {own} there and "
                f"{shown(described[name])} here; fetch both files of one model"
            )


def _read_alphabet(folder: Path, size: int) -> Alphabet:
    path = folder / "vocab.txt"
    try:
        text = read_bounded(path, MAX_VOCABULARY).decode("utf-8-sig")
        return alphabet_of([line.strip() for line in text.splitlines()], size)
    except ValueError as error:
        raise RunError(f"{path} is not an alphabet of proteins: {one_line(error)}") from error


def alphabet_of(tokens: Sequence[str], size: int) -> Alphabet:
    """The alphabet of a published vocabulary.

    Args:
      tokens: In the order of their ids.
      size: Rows of the embedding table; rows without a token get unused ones.

    Raises:
      ValueError: If a special token is missing, or there are more tokens than rows.
    """
    if "" in tokens:
        raise ValueError(f"line {tokens.index('') + 1} is empty: each line is a token")
    repeated = next((token for token in tokens if tokens.count(token) > 1), None)
    if repeated is not None:
        raise ValueError(f"{shown(repeated)} stands there more than once; fetch it again")
    if len(tokens) > size:
        raise ValueError(f"it has {len(tokens)} tokens, and the model {size} embeddings")
    special = {}
    for name, candidates in _SPECIAL.items():
        known = [token for token in candidates if token in tokens]
        if len(known) != 1:
            raise ValueError(f"expected one of {' and '.join(candidates)} among the tokens")
        special[name] = known[0]
    padded = (*tokens, *(f"<unused_{number}>" for number in range(len(tokens), size)))
    letters = {token for token in padded if len(token) == 1 and token in FASTA_SYMBOLS}
    return Alphabet(
        padded,
        rare="".join(letter for letter in _RARE if letter in letters),
        gaps="".join(letter for letter in _GAPS if letter in letters),
        unknown="X" if "X" in letters else None,
        unused=tuple(x for x in padded if x not in letters and x not in special.values()),
        **special,
    )
