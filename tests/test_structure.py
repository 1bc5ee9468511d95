"""The sizes that the code keeps to."""

import ast
import re
from pathlib import Path

import pytest

import fast_attention

PACKAGE = Path(fast_attention.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PRESETS = {"performer", "reformer", "linear_attention_transformer"}
MAX_LINES, MAX_PARAMETERS, MAX_PRESET = 400, 15, 40


def names(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def parameters(function: ast.FunctionDef) -> int:
    """How many there are besides self; ``**keywords`` counts as one."""
    given = function.args
    variadic = (given.vararg is not None) + (given.kwarg is not None)
    return len([*given.posonlyargs, *given.args, *given.kwonlyargs]) + variadic - 1


def constructors():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                        yield f"{names(path)}: {node.name}", parameters(inner)


def test_no_module_has_more_than_15_constructor_parameters():
    found = dict(constructors())
    assert len(found) > 20
    assert {name: number for name, number in found.items() if number > MAX_PARAMETERS} == {}


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        total -= function.body[0].end_lineno - function.body[0].lineno + 1
    return total


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_has_at_most_40_lines(name):
    tree = ast.parse((PACKAGE / "models" / f"{name}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    presets = [node for node in functions if not node.name.startswith("_")]
    assert len(presets) >= 2
    # What the presets share is held to the same.
    assert {f.name: n for f in functions if (n := code_lines(f)) > MAX_PRESET} == {}


def test_the_tests_that_hold_the_laws_exist():
    """Each row of docs/acceptance.md names files and, after each, tests in it."""
    tests = Path(__file__).parent
    rows = re.findall(r"^\| (A\d+) .*\|(.*)\|$", _acceptance(tests), re.MULTILINE)
    assert [name for name, _ in rows] == [f"A{number}" for number in range(1, 19)]
    for row, cell in rows:
        source = None
        for name in re.findall(r"`([^`]+)`", cell):
            if name.endswith(".py"):
                source = (tests / name).read_text()
            else:
                assert source is not None and f"def {name}(" in source, f"{row}: {name}"


def _acceptance(tests: Path) -> str:
    return (tests.parent / "docs" / "acceptance.md").read_text()
