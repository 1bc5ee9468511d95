"""Every number that a person can give is checked by name before any work."""

import argparse
import math

import pytest

from fast_attention.protein_lm import cli, gin_registry, ranges
from fast_attention.protein_lm.cli.commands import COMMANDS


def numeric_options():
    """Command, option and range of every option that takes a number."""
    found = []
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        for action in parser._actions:
            if action.type is not None:
                found.append((name, action.option_strings[0]))
    return found


def text_options():
    """Command and option of every option that takes a text."""
    found = []
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        for action in parser._actions:
            if action.type is None and action.option_strings and action.nargs is None:
                found.append((name, action.option_strings[-1]))
    return found


NOT_NUMBERS = ("nan", "inf", "-inf", "1e999", "x", "", "9" * 5000, "1_0", "\u0663")
OPTIONS = numeric_options()


@pytest.mark.parametrize(("command", "option"), text_options(), ids="".join)
def test_an_empty_text_is_refused_by_name(command, option, capsys):
    # As of --heatmap=$PICTURE in a script where the variable is not set.
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, f"{option}="])
    assert stopped.value.code == 2
    assert f"argument {option}: expected a value, got an empty text" in capsys.readouterr().err


def test_every_option_with_a_default_number_has_a_range():
    for module in COMMANDS.values():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        for action in parser._actions:
            assert action.type not in (int, float), action.option_strings
            if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
                assert action.type is not None, action.option_strings


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids="".join)
def test_what_is_no_such_number_is_refused_by_name(command, option, capsys):
    for text in (*NOT_NUMBERS, "-1000000", str(10**23)):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, f"{option}={text}"])
        assert stopped.value.code == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"protein-lm {command}: error: argument {option}: expected ")
        assert " from " in told or " above " in told or " between " in told


@pytest.mark.parametrize(
    ("command", "option"),
    [pair for pair in OPTIONS if pair[1] not in ("--seed", "--process_id", "--layers")],
    ids="".join,
)
def test_zero_is_refused_but_where_it_means_something(command, option, capsys):
    if option == "--temperature":
        return
    with pytest.raises(SystemExit):
        cli.main([command, f"{option}=0"])
    assert f"argument {option}: expected a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (ranges.SEED, [0, 2**32 - 1], [-1, 2**32, 0.5, True]),
        (ranges.COUNT, [1, 10**9], [0, 10**9 + 1, 10**400]),
        (ranges.PROBABILITY, [1e-300, 1, 1.0], [0.0, 1.0001, math.nan, 10**400]),
        (ranges.SHARE, [0.5], [0, 1, math.inf]),
        (ranges.TEMPERATURE, [0, 0.001, 1000.0], [1e-300, 1001, -0.1]),
    ],
    ids=["seed", "count", "probability", "share", "temperature"],
)
def test_ranges_hold_what_they_say(allowed, inside, outside):
    for value in inside:
        ranges.check("x", value, allowed)
        assert allowed.parse(str(value)) == value
    for value in outside:
        with pytest.raises(ValueError, match=f"x must be {allowed}, but got {value!r}"):
            ranges.check("x", value, allowed)
        with pytest.raises(ValueError, match=f"expected {allowed}, got"):
            allowed.parse(str(value))


@pytest.mark.parametrize(
    "name", [f"{name}.{key}" for name, table in ranges.SETTINGS.items() for key in table]
)
def test_settings_of_gin_are_checked_by_name(name):
    for value in ("-1", "'a'", "1e300", "1e999", "True", str(10**23)):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            gin_registry.configure([], [f"{name} = {value}"])


def test_settings_that_are_references_or_none_are_left_to_their_use():
    gin_registry.configure(
        [],
        [
            "experiment.num_eval_steps = None",
            "experiment.max_train_steps = %steps",
            "steps = 5",
            "FlaxModel.learning_rate = @create_learning_rate_scheduler()",
        ],
    )


def test_numbers_that_do_not_fit_together_are_refused_before_any_work(tmp_path, capsys):
    model, output = f"--run_dir={tmp_path}", f"--output={tmp_path / 'x.fasta'}"
    contradiction = ["sample", model, output, "--min_length=9", "--max_length=8"]
    assert cli.main(contradiction) == 2
    assert "--min_length=9 is more" in capsys.readouterr().err
    for arguments, message in (
        (
            ["evaluate", model, output, "--fasta=x", f"--seed={2**32 - 1}", "--num_seeds=2"],
            "--seed plus --num_seeds minus 1 must be",
        ),
        (["train", f"--work_dir={tmp_path / 'y'}", "--fasta=a=nan"], "the weight of --fasta=a"),
        (["train", f"--work_dir={tmp_path / 'y'}", "--fasta=a=-1"], "the weight of --fasta=a"),
    ):
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
