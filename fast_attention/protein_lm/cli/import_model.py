"""``protein-lm import``."""

from __future__ import annotations

import argparse
import sys

from fast_attention.protein_lm import messages

SUMMARY = "convert a published ESM-2 or BERT model to a model folder"
DESCRIPTION = """\
Convert a published ESM-2 or BERT protein model (ProtBERT, AntiBERTy) to a new folder. evaluate,
score, mutate, embed, fine-tune, sample --infill and export accept the new folder as --run_dir.
The source is a Hugging Face folder with config.json, vocab.txt and model.safetensors (or several
with an index) or pytorch_model.bin, or fair-esm's .pt file of an ESM-2 model. PyTorch is not
needed, and no code in the files is executed.

  protein-lm import --from=esm2_t6_8M_UR50D --work_dir=runs/esm2_8m
  protein-lm score --run_dir=runs/esm2_8m --fasta=proteins.fasta --output=scores.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--from", required=True, metavar="PATH", dest="source", help="the published model"
    )
    parser.add_argument("--work_dir", required=True, metavar="FOLDER", help="the new folder")


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.runs.importing import import_model
    from fast_attention.protein_lm.wording import counted, place

    found = import_model(options.source, options.work_dir)
    parameters = counted(found.model.num_parameters, "parameter")
    messages.note(f"model with {parameters} written to {place(options.work_dir)}", sys.stdout)
    if found.other_heads:
        left_out = ", ".join(found.other_heads)
        messages.note(f"other heads are not imported: {left_out}", sys.stdout)
