"""``python -m fast_attention.protein_lm`` is the command ``protein-lm``."""

import sys

from fast_attention.protein_lm.cli import main

if __name__ == "__main__":
    sys.exit(main())
