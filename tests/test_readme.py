"""Every code block of the README runs: its Python as it stands, its commands on little data."""

import re
import shlex
import tomllib
from pathlib import Path

import gin
import jax
import pytest

from fast_attention import FastAttention
from fast_attention.protein_lm import cli, gin_registry
from fast_attention.protein_lm.data.fasta import FastaRecord, read_fasta, write_fasta

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def commands() -> list[list[str]]:
    lines = [part for block in blocks("sh") for part in re.split(r"\n|&&", block)]
    return [shlex.split(line) for line in lines if line.strip()]


def test_every_block_is_of_a_kind_that_is_run_here():
    assert {name for name, _ in BLOCKS} == {"gin", "python", "sh"}
    assert {command[0] for command in commands()} == {"pip", "protein-lm", "pytest"}


def test_the_two_commands_stand_there_as_one_line_each():
    assert (
        'pip install -e ".[protein]" && protein-lm train --gin_file=demo --work_dir=runs/demo\n'
    ) in blocks("sh")
    assert 'pip install -e ".[test]" && pytest\n' in blocks("sh")


def test_python_blocks_run_one_after_the_other():
    namespace = {}
    for block in blocks("python"):
        if "runs/demo" in block:
            continue  # Comes after the commands, below.
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["y"].shape == namespace["x"].shape
    whole = namespace["attention_fn"](namespace["query"], namespace["key"], namespace["value"])
    decoded = namespace["next_out"]
    assert jax.numpy.max(jax.numpy.abs(whole[:, -1] - decoded)) < 1e-4


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "pip"], ids=shlex.join)
def test_what_is_installed_exists(command):
    assert command[1:3] == ["install", "-e"]
    extra = re.fullmatch(r"\.(?:\[(\w+)\])?", command[3])
    assert extra, command
    assert extra[1] is None or extra[1] in PROJECT["project"]["optional-dependencies"]


def test_pytest_alone_finds_the_tests():
    assert ["pytest"] in commands()
    assert PROJECT["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]


@pytest.mark.parametrize("block", blocks("gin"))
def test_gin_blocks_bind_what_they_say(block):
    gin_registry.configure(bindings=block.splitlines())
    bound = gin.query_parameter("FlaxModel.attention_fn").scoped_configurable_fn()
    assert isinstance(bound, FastAttention)


# The commands as they stand, but on few and short proteins, with a small model and two steps.
SMALL = {
    "train": [
        "--fasta=my_proteins.fasta",
        "--valid_fasta=my_proteins.fasta",
        "--test_fasta=my_proteins.fasta",
        "--gin_bindings=make_protein_domain.length = 32",
        "--gin_bindings=FlaxModel.num_layers = 1",
        "--gin_bindings=FlaxModel.emb_dim = 16",
        "--gin_bindings=FlaxModel.qkv_dim = 16",
        "--gin_bindings=FlaxModel.mlp_dim = 16",
        "--gin_bindings=experiment.batch_size_per_device = 2",
        "--gin_bindings=experiment.max_train_length = 32",
        "--gin_bindings=experiment.max_train_steps = 2",
        "--gin_bindings=experiment.max_sample_length = 8",
    ],
    "score": [],
    "evaluate": [],
    "mutate": [],
    "sample": ["--max_length=8"],
    "embed": [],
    "fine-tune": [],
    "predict": [],
    "diagnose": [],
}


def test_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    proteins = ["MKTAYIAKQRQISFVKSHFSRQ", "MALWMRLLPLLALLALWGPDPAAA", "MGDVEKGKKIFIMKCSQCHTVEK"] * 4
    write_fasta(
        "my_proteins.fasta",
        [FastaRecord(f"p{i}", "", protein) for i, protein in enumerate(proteins)],
    )
    write_fasta("wild_type.fasta", [FastaRecord("w", "", "MKTAYIAK")])
    rows = [f"{protein[i:]},{i % 5}" for i, protein in enumerate(proteins)]
    Path("stability.csv").write_text("\n".join(["sequence,label", *rows]))
    run = [command[1:] for command in commands() if command[0] == "protein-lm"]
    assert [command[0] for command in run] == list(SMALL)
    for command in run:
        status = cli.main([*command, *SMALL[command[0]]])
        assert status == 0, capsys.readouterr()
        assert "nan" not in capsys.readouterr().out
    assert len(list(read_fasta("new_proteins.fasta"))) == 10
    tables = ("scores.tsv", "effects.tsv", "predicted.tsv")
    for output in (*tables, "effects.png", "fidelity.png", "vectors.npz"):
        assert Path(output).stat().st_size
    (block,) = (block for block in blocks("python") if "runs/demo" in block)
    exec(compile(block, "README.md", "exec"), {})
