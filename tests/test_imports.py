"""What importing the package loads, and that it stands alone."""

import ast
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


def test_a_model_is_loaded_for_scores_without_what_trains_and_draws():
    code = """
from fast_attention.protein_lm.cli import score
from fast_attention.protein_lm.inference import score_files
from fast_attention.protein_lm.loading import load_run
"""
    loaded = {name.partition(".")[0] for name in told_after(code, "sorted(sys.modules)")}
    assert "jax" in loaded
    assert not {"gin", "grain", "tensorboardX", "matplotlib"} & loaded


def test_import_runs_no_computation_and_loads_pallas_for_a_kernel_alone():
    """A backend started at import would take the accelerator before the user can choose."""
    code = "import fast_attention, jax._src.xla_bridge as bridge"
    backends, names = told_after(code, "[sorted(bridge._backends), sorted(sys.modules)]")
    assert backends == []
    assert "fast_attention" in names
    assert not [name for name in names if name.startswith("jax.experimental.pallas")]


def imported_modules(path):
    """The modules of the package that a file imports anywhere, also inside functions."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING")]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            found |= {name} if name else set()
    return found


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
IMPORTS = {name: imported_modules(path) - {name} for name, path in MODULES.items()}

FLOORS_OF_THE_PACKAGE = [
    "arrays",
    "feature_maps",
    "mesh",
    "linear",
    "mechanisms",
    "diagnostics",
    "layers",
    "models",
    "protein_lm",
]
FLOORS_OF_THE_APPLICATION = [
    "files",
    "data",
    "distributed",
    "modeling",
    "runs",
    "inference",
    "evaluation",
    "finetune",
    "training",
    "cli",
]


@pytest.mark.parametrize(
    ("folder", "floors"),
    [
        ("fast_attention", FLOORS_OF_THE_PACKAGE),
        ("fast_attention.protein_lm", FLOORS_OF_THE_APPLICATION),
    ],
    ids=["package", "application"],
)
def test_arrows_point_down(folder, floors):
    """No floor imports from a floor above it."""

    def floor(name):
        first = name.removeprefix(f"{folder}.").partition(".")[0]
        return floors.index(first) if first in floors else None

    for name, imports in IMPORTS.items():
        for other in imports:
            if (here := floor(name)) is not None and (there := floor(other)) is not None:
                assert there <= here, f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle():
    """Neither at once nor inside functions; a package may be imported by its own modules."""
    waiting = {name: set(imports) for name, imports in IMPORTS.items()}
    while ready := [name for name, imports in waiting.items() if not imports & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting


def test_the_core_knows_nothing_of_flax():
    for name, path in MODULES.items():
        if name.split(".")[1:2] and name.split(".")[1] in FLOORS:
            imports = re.findall(r"^ *(?:from|import) (\S+)", path.read_text(), re.MULTILINE)
            assert not [other for other in imports if other.startswith("flax")], name


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_no_module_reaches_outside_the_package(path):
    source = path.read_text()
    for forbidden in ("/work", "shared/", "/tmp", "/home", "sys.path.insert", "sys.path.append"):
        assert forbidden not in source
