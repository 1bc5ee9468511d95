"""Tutorials run as the notebooks that the site offers, each in a fresh kernel and an empty folder.

The tutorial on AntiBERTy runs with its weights if the variable ``ANTIBERTY`` names the folder
``antiberty`` that the tutorial unpacks, and otherwise with a small model of random weights.
"""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
notebook = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))["notebook"]


def put_antiberty(folder):
    """What the tutorial downloads, or a BERT of random weights that reads as many tokens."""
    if own := os.environ.get("ANTIBERTY"):
        (folder / "antiberty").symlink_to(own, target_is_directory=True)
        return
    model = folder / "antiberty" / "trained_models" / "AntiBERTy_md_smooth"
    shutil.copytree(ROOT / "tests" / "data" / "pretrained" / "bert_tiny", model)
    (model / "vocab.txt").rename(model.parent / "vocab.txt")
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 512}))
    arrays = safetensors.numpy.load_file(model / "model.safetensors")
    positions = "bert.embeddings.position_embeddings.weight"
    arrays[positions] = np.tile(arrays[positions], (8, 1))
    safetensors.numpy.save_file(arrays, model / "model.safetensors")


def environment(folder):
    """Of a reader whose shell finds `protein-lm`, and who has chosen no devices."""
    command = folder / "bin" / "protein-lm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m fast_attention.protein_lm "$@"\n')
    command.chmod(0o755)
    chosen = ("JAX_NUM_CPU_DEVICES", "NPROC")
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {name: x for name, x in os.environ.items() if name not in chosen} | {
        "IPYTHONDIR": str(folder / "ipython"),
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag),
    }


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(page, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    if page.stem == "linear-antiberty":
        put_antiberty(work)
    client = NotebookClient(
        notebook(page), timeout=600, resources={"metadata": {"path": str(work)}}
    )
    client.execute(env=environment(tmp_path))
