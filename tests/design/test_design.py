"""Five changes that the package must make easy (docs/architecture.md, "Where to make changes")."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fast_attention
from fast_attention import FastAttention
from fast_attention.protein_lm.gin_registry import configure
from fast_attention.protein_lm.models import FlaxLM
from tests.design.softplus_features import SoftplusFeatures
from tests.design.uniform.fn import make_uniform_attention
from tests.hosts.adapters import HOSTS, assert_close, inputs, quadratic_attention
from tests.mechanisms import dense, test_table
from tests.mechanisms.table import FUNCTIONS, NO_FEATURES, OF_KEYS, Case, Function

PACKAGE = Path(fast_attention.__file__).parent
T, H, D = 13, 2, 8


@pytest.mark.parametrize("causal", [False, True])
def test_a_feature_map_is_one_file(causal):
    """It works in both modules of Flax, with gradients, and token by token."""
    function = FastAttention(SoftplusFeatures(), unidirectional=causal)
    rows = function.resolve_parameters(None, D)
    features = lambda x: jax.nn.softplus(x @ rows.T)  # noqa: E731
    defined = quadratic_attention(features, unidirectional=causal)
    for host in HOSTS:
        parameters, apply = host.build(function)
        _, define = host.build(defined)

        def gradient(call, parameters=parameters):
            return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(call(parameters, x)))))(inputs())

        assert_close(apply(parameters, inputs()), define(parameters, inputs()))
        assert_close(gradient(apply), gradient(define))
    if causal:
        query, key, value = jax.random.normal(jax.random.key(0), (3, T, H, D))
        state = function.init_state((), H, D, D)
        first, state = function.prefill(state, query[:-1], key[:-1], value[:-1])
        last, _ = function.step(state, query[-1], key[-1], value[-1])
        assert_close(jnp.concatenate([first, last[None]]), defined(query, key, value))


def uniform(function, query, key, seen, bias, causal=False):
    return dense.normalized(np.zeros(seen.shape), seen, bias)


@pytest.fixture
def registered(monkeypatch):
    """One line in the table of tests."""
    refused = OF_KEYS | NO_FEATURES
    entry = Function(make_uniform_attention, uniform, refused, along_sequence=False)
    monkeypatch.setitem(FUNCTIONS, "uniform", entry)


@pytest.mark.parametrize("direction", ["both ways", "causal", "is_causal"])
def test_a_mechanism_is_one_folder_and_one_line(direction, registered):
    """It honours or refuses every option in every way to call, as the others do."""
    case = Case("uniform", direction)
    for run, has in test_table.WAYS.values():
        if has(case):
            run(case, test_table.together(case))
    for option in FUNCTIONS["uniform"].refuses:
        if direction != "is_causal":
            with pytest.raises(ValueError, match=FUNCTIONS["uniform"].refuses[option]):
                test_table.eager(case, [option])


def test_a_mechanism_trains_a_model_from_one_line_of_gin():
    gin.external_configurable(make_uniform_attention, "make_uniform_attention")
    configure(bindings=["FlaxModel.attention_fn = @make_uniform_attention()"])
    try:
        model = FlaxLM(max_len=T, num_layers=1, num_heads=2, emb_dim=8, qkv_dim=8, mlp_dim=8)
        tokens = np.arange(1, 1 + T)[None] % 20
        losses = [float(model.fit_batch(tokens)["loss"][0]) for _ in range(5)]
        assert losses[-1] < losses[0]
    finally:
        gin.clear_config()


def run_in_a_copy(tmp_path, change, program):
    """Copies the package, changes the copy, and runs a program there."""
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "bundled")
    shutil.copytree(PACKAGE, root / "fast_attention", ignore=ignored)
    change(root / "fast_attention")
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=root
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def replace(path, old, new):
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_a_keyword_of_every_function_is_one_file(tmp_path):
    """``temperature`` divides the queries of all mechanisms."""

    def change(package):
        path = package / "mechanisms" / "attention_fn.py"
        signature = "        return_buckets: bool = False,\n    ) -> Any:"
        added = signature.replace("    ) ->", "        temperature: float = 1.0,\n    ) ->")
        replace(path, signature, added)
        replace(
            path,
            "        call = bind(",
            "        query = query / temperature\n        call = bind(",
        )

    program = """
import jax
import numpy as np
import fast_attention as fa

query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
for make in (
    lambda: fa.make_fast_softmax_attention(4, nb_features=8),
    lambda: fa.make_fast_generalized_attention(4, nb_features=8),
    fa.make_softmax_attention,
    lambda: fa.make_local_attention(2),
    fa.make_efficient_attention,
):
    attend = make()
    found = attend(query, key, value, temperature=2.0)
    np.testing.assert_allclose(found, attend(query / 2, key, value), rtol=1e-6)
    assert abs(found - attend(query, key, value)).max() > 1e-4
"""
    run_in_a_copy(tmp_path, change, program)


def test_a_row_of_the_chunk_table_is_one_line(tmp_path):
    """One row for a kind of device changes the chunk of that kind, and of no other."""

    def change(package):
        path = package / "linear" / "chunked" / "chunk_table.py"
        row = '    ("NVIDIA H100", True, 64, 256): (96, 1, "guess"),\n'
        replace(path, "CHUNKS = {\n", f"CHUNKS = {{\n{row}")

    program = """
import jax.numpy as jnp
import fast_attention as fa

x = jnp.ones((1, 4, 1, 64))
for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "TPU v5e", "cpu"):
    attend = fa.make_fast_softmax_attention(
        64, unidirectional=True, implementation="chunked", device_kind=kind
    )
    print(fa.explain(attend, x, x, x))
"""
    changed = run_in_a_copy(tmp_path / "1", change, program).splitlines()
    before = run_in_a_copy(tmp_path / "2", lambda package: None, program).splitlines()
    assert "chunks of 96 on XLA (from the table: guess for NVIDIA H100)" in changed[0]
    assert changed[1:] == before[1:] and changed[0] != before[0]


def test_linformer_can_be_deleted(tmp_path):
    """Its folder, its layer, its exports, its registry line and its keywords of a preset."""

    def change(package):
        shutil.rmtree(package / "mechanisms" / "linformer")
        (package / "layers" / "attention" / "linformer.py").unlink()
        # The preset whose keywords name it.
        (package / "models" / "originals" / "linear_attention_transformer.py").unlink()
        for name in ("__init__.py", "layers/__init__.py", "models/__init__.py"):
            drop_imports(package / name, ("informer", "linear_attention_transformer"))
        sublayer = package / "layers" / "stack" / "sublayer.py"
        drop_imports(sublayer, ("informer",))
        replace(sublayer, "    LinformerConfig: LinformerAttention,\n", "")
        left = [path for path in package.rglob("*.py") if "informer" in path.read_text()]
        assert not left

    program = """
from flax import nnx
import jax.numpy as jnp
import fast_attention.layers
from fast_attention.models import Performer

model = Performer(dim=8, depth=1, heads=2, causal=True, dim_head=4, rngs=nnx.Rngs(0))
print(model(jnp.ones((1, 5, 8))).shape)
"""
    assert run_in_a_copy(tmp_path, change, program) == "(1, 5, 8)\n"


def drop_imports(path, words):
    """Removes the import statements of a file that name one of the words."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.ImportFrom) and any(word in ast.unparse(node) for word in words):
            del lines[node.lineno - 1 : node.end_lineno]
    path.write_text("".join(lines))
