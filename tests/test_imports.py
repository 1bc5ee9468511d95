"""What importing the package loads, and that it stands alone."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

import fast_attention

PACKAGE = pathlib.Path(fast_attention.__file__).parent
HEAVY = ["gin", "grain", "matplotlib", "optax", "orbax", "tensorboardX", "tqdm"]
CORE = [
    "fast_attention",
    "fast_attention.array_types",
    "fast_attention.mechanisms.favor.factories",
    "fast_attention.mechanisms.axes",
    "fast_attention.diagnostics",
    "fast_attention.mechanisms.efficient.fn",
    "fast_attention.linformer",
    "fast_attention.local_attention",
    "fast_attention.mechanisms.local.fn",
    "fast_attention.mechanisms.masks",
    "fast_attention.mesh_attention",
    "fast_attention.meshes",
    "fast_attention.mechanisms.strided.fn",
    *(
        f"fast_attention.{folder}.{path.stem}"
        for folder in ("feature_maps", "linear_attention", "lsh_attention", "near_field")
        for path in sorted((PACKAGE / folder).glob("[!_]*.py"))
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
    for folder in ("feature_maps", "linear_attention", "lsh_attention", "near_field"):
        for path in (PACKAGE / folder).glob("*.py"):
            source = path.read_text()
            for above in ("layers", "models", "protein_lm", "attention_fn", "flax"):
                assert f"import {above}" not in source
                assert f"fast_attention.{above}" not in source
    for path in (PACKAGE / "feature_maps").glob("*.py"):
        assert "fast_attention.linear_attention" not in path.read_text()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_reaches_outside_the_package(path):
    source = path.read_text()
    for forbidden in ("/work", "shared/", "/tmp", "/home", "sys.path"):
        assert forbidden not in source
