"""``python -m fast_attention.protein_lm`` is the command ``protein-lm``."""

import os
import sys

# With -m and without -P, Python looks for modules in the current folder first, where data may lie.
if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from fast_attention.protein_lm.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
