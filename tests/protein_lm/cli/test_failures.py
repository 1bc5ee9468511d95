import argparse
import re

import gin
import jax
import pytest

from fast_attention.protein_lm import cli, gin_registry
from fast_attention.protein_lm.cli.commands import COMMANDS
from fast_attention.protein_lm.cli.failures import describe_failure
from fast_attention.protein_lm.training import train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nFlaxModel.num_layers == 2\n", r"a\.gin, line 2: .*NAME\.PARAMETER = VALUE.*=="),
        ("FlaxModel.num_layers = 'a\n", r"a\.gin, line 1: Unable to parse value"),
        ("\nFlaxModel.num_layers = (1,\n", r"a\.gin, line [23]: Unable to parse value.*brackets"),
        ("\nexperimnt.max_train_steps = 5", r"'experimnt'.*a\.gin\", line 2: experimnt\.max"),
        ("experiment.foo = 1", r"named 'foo'. In .*a\.gin\", line 1: experiment\.foo = 1"),
        ("FlaxModel.attention_fn = @slow()", r"'@slow\(\)'.*a\.gin\", line 1"),
        ("include 'nope.gin'", r"nope\.gin.*a\.gin\", line 1"),
        ("import nope_module", r"nope_module.*a\.gin\", line 1.*pip install"),
        ("FlaxModel.num_layers = %NOPE", r"NOPE"),
        (
            "FlaxModel.num_layers = 'a'",
            r"^FlaxModel.num_layers must be a whole number .*, but got 'a'",
        ),
        (
            "experiment.batch_size_per_device = -1",
            r"_per_device must be a whole number .*, but got -1$",
        ),
        ("FlaxModel.num_kv_head = 1", "'num_kv_head': did you mean 'num_kv_heads'\\?$"),
        ("experiment.on_error = 'ignore'", r"on_error must be .*'skip'.*'ignore'"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(tmp_path, tiny_fasta, text, message):
    path = tmp_path / "a.gin"
    path.write_text(text)
    with pytest.raises(Exception, match=".") as caught:
        gin_registry.configure([path], [f"experiment.train_files = {tiny_fasta!r}"])
        train.run_experiment(str(tmp_path / "run"), gin.get_configurable("experiment")())
    told = describe_failure(caught.value)
    assert "\n" not in told and "0x" not in told
    assert re.search(message, told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", ["a = 1".encode("utf-16"), bytes(range(256))], ids=["utf_16", "binary"]
)
def test_a_gin_file_that_is_no_text_is_named(tmp_path, content):
    path = tmp_path / "a.gin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gin is no gin file.*UTF-8"):
        gin_registry.configure([path])


def test_a_gin_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.gin"
    path.write_bytes(b"\xef\xbb\xbfexperiment.max_train_steps = 5\n")
    gin_registry.configure([path])
    assert gin.query_parameter("experiment.max_train_steps") == 5


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: take a smaller --max_length"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nx"),
            "out of memory: .*allocating 9 bytes",
        ),
        (FileNotFoundError(2, "No such file or directory", "a.gin"), "^a.gin: No such file"),
        (OSError(28, "No space left on device"), "the disk is full: make room"),
        (OSError(5, "Input/output error", "a.npz"), "^a.npz: a read error .*try again"),
        (KeyError("weights"), "unexpected KeyError: 'weights'.*--traceback"),
        (AssertionError(), "unexpected AssertionError: AssertionError.*--traceback"),
        (ModuleNotFoundError("No module named 'grain'"), "'grain'.*pip install"),
        (EOFError("cut"), "unexpected EOFError: cut"),
    ],
)
def test_whatever_fails_a_command_is_one_line_and_status_1(monkeypatch, capsys, error, message):
    def run(options: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(COMMANDS["sample"], "run", run)
    assert cli.main(["sample", "--run_dir=x", "--output=y"]) == 1
    told = capsys.readouterr().err
    assert re.search(message, told.removeprefix("protein-lm sample: error: "))
    assert told.count("\n") == 1
