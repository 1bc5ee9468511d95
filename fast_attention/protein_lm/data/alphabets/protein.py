"""Amino acids as Google's protein_lm numbers them, without and with gaps of alignments.

``ACDEFGHIKLMNPQRSTVWY`` are 0-19, ``BOUXZ`` 20-24, ``<`` 25, ``>`` 26, ``_`` 27, ``*`` 28.
"""

from fast_attention.protein_lm.data.alphabet import Alphabet

STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
ANOMALOUS_RESIDUES = "BOUXZ"
ALIGNMENT_TOKENS = ".-"


def _protein(gaps: str) -> Alphabet:
    return Alphabet(
        tokens=tuple(STANDARD_RESIDUES + ANOMALOUS_RESIDUES + gaps + "<>_*"),
        rare=ANOMALOUS_RESIDUES,
        gaps=gaps,
        unknown="X",
        bos_token="<",
        eos_token=">",
        pad_token="_",
        mask_token="*",
    )


PROTEIN = _protein("")
ALIGNED_PROTEIN = _protein(ALIGNMENT_TOKENS)
