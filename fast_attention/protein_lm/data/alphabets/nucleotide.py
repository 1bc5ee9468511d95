"""Nucleotides of DNA, with the ambiguity letters of IUPAC (Cornish-Bowden 1985).

RNA is read after its U is written as T.
"""

from fast_attention.protein_lm.data.alphabet import Alphabet

AMBIGUITIES = "RYSWKMBDHVN"

NUCLEOTIDE = Alphabet(
    tokens=tuple("ACGT" + AMBIGUITIES + "<>_*"),
    rare=AMBIGUITIES,
    unknown="N",
    bos_token="<",
    eos_token=">",
    pad_token="_",
    mask_token="*",
    longest=1_000_000,
)
