"""The 33 tokens of ESM-1b and ESM-2, in the order of their ids (Lin et al. 2023, ESM-2)."""

from fast_attention.protein_lm.data.alphabet import Alphabet

ESM = Alphabet(
    tokens=(
        *("<cls>", "<pad>", "<eos>", "<unk>"),
        *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
        *("<null_1>", "<mask>"),
    ),
    rare="XBUZO",
    gaps=".-",
    unknown="X",
    bos_token="<cls>",
    eos_token="<eos>",
    pad_token="<pad>",
    mask_token="<mask>",
    unused=("<unk>", "<null_1>"),
)
