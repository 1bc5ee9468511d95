"""The alphabets that a configuration can name: one file each, and one line here."""

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.alphabets.esm import ESM
from fast_attention.protein_lm.data.alphabets.nucleotide import NUCLEOTIDE
from fast_attention.protein_lm.data.alphabets.protein import ALIGNED_PROTEIN, PROTEIN
from fast_attention.protein_lm.ranges import check_choice

ALPHABETS: dict[str, Alphabet] = {
    "protein": PROTEIN,
    "aligned_protein": ALIGNED_PROTEIN,
    "esm": ESM,
    "nucleotide": NUCLEOTIDE,
}


def get_alphabet(name: str) -> Alphabet:
    """Returns the alphabet of that name.

    Raises:
      ValueError: If there is none.
    """
    check_choice("alphabet", name, ALPHABETS)
    return ALPHABETS[name]
