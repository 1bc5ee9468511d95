"""What importing the package loads, and that it stands alone."""

import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

import fast_attention

PACKAGE = pathlib.Path(fast_attention.__file__).parent
HEAVY = ["gin", "grain", "matplotlib", "optax", "orbax", "tensorboardX", "tqdm"]
FLOORS = ("arrays", "feature_maps", "mesh", "linear", "mechanisms", "diagnostics")
CORE = [
    "fast_attention",
    *(
        ".".join(("fast_attention", *path.relative_to(PACKAGE).with_suffix("").parts))
        for folder in FLOORS
        for path in sorted((PACKAGE / folder).rglob("[!_]*.py"))
    ),
]


def told_after(code, expression):
    """Returns a value, as JSON has it, from a fresh interpreter after ``code``."""
    program = f"import json, sys\n{code}\nprint(json.dumps({expression}))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_the_core_needs_jax_and_numpy_alone():
    names = told_after("\n".join(f"import {name}" for name in CORE), "sorted(sys.modules)")
    loaded = {name.partition(".")[0] for name in names}
    assert "jax" in loaded
    assert not {*HEAVY, "flax"} & loaded


def test_every_factory_of_the_readme_is_exported():
    readme = PACKAGE.parent.joinpath("README.md").read_text(encoding="utf-8")
    factories = set(re.findall(r"\bmake_\w+", readme))
    assert "make_softmax_attention" in factories
    assert [name for name in sorted(factories) if not hasattr(fast_attention, name)] == []


def test_a_module_is_what_its_name_imports():
    """No function takes the place of a module of the same name in the package that holds it."""
    hidden = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] in ("__init__", "__main__"):
            continue
        module = importlib.import_module(".".join(parts))
        if inspect.getattr_static(sys.modules[module.__package__], parts[-1]) is not module:
            hidden.append(module.__name__)
    assert not hidden


def test_import_runs_no_computation():
    """A backend started at import would take the accelerator before the user can choose."""
    code = "import fast_attention, jax._src.xla_bridge as bridge"
    assert told_after(code, "sorted(bridge._backends)") == []


def test_pallas_is_loaded_when_a_kernel_is_asked_for():
    names = told_after("import fast_attention", "sorted(sys.modules)")
    assert "fast_attention" in names
    assert not [name for name in names if name.startswith("jax.experimental.pallas")]


def test_arrows_point_down():
    """Nothing in the core imports from the layers, models or applications above it."""
    rooms = ("feature_maps", "linear", "near_field", "mechanisms")
    for folder in rooms:
        for path in (PACKAGE / folder).rglob("*.py"):
            imports = re.findall(r"^ *(?:from|import) (\S+)", path.read_text(), re.MULTILINE)
            above = ["fast_attention.layers", "fast_attention.models", "fast_attention.protein_lm"]
            above += [] if folder == "mechanisms" else ["fast_attention.mechanisms.attention_fn"]
            found = [name for name in imports if name.startswith((*above, "flax"))]
            assert not found, f"{path.name} imports {found}"
    for path in (PACKAGE / "feature_maps").glob("*.py"):
        assert "fast_attention.linear." not in path.read_text()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_reaches_outside_the_package(path):
    source = path.read_text()
    for forbidden in ("/work", "shared/", "/tmp", "/home", "sys.path.insert", "sys.path.append"):
        assert forbidden not in source
