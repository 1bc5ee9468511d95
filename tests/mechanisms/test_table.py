"""Every option of every attention function, called in every way: honoured, or refused in words.

The judge is the dense definition in float64, see :mod:`tests.mechanisms.dense`; what is crossed is
in :mod:`tests.mechanisms.table`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fast_attention import on_mesh
from fast_attention.mesh.meshes import make_mesh
from tests.mechanisms.table import (
    CASES,
    NOT_A_MASK_OF_KEYS,
    OPTIONS,
    VISIBLE,
    B,
    D,
    H,
    T,
    together,
)

# Arguments that are no arrays, and those that are alike for all rows of the batch.
STATIC = ("is_causal",)
SHARED = ("projection",)
PADS = {"padding", "query_mask"}


def split(options):
    static = {name: x for name, x in options.items() if name in STATIC}
    return static, {name: x for name, x in options.items() if name not in STATIC}


def jitted(function, arrays, options):
    static, traced = split(options)
    return jax.jit(lambda arrays, traced: function(*arrays, **traced, **static))(arrays, traced)


def check(found, case, names, atol=2e-5):
    """Compares rows that matter: those of padding do not."""
    rows = VISIBLE if PADS & set(names) else np.ones((B, T), bool)
    np.testing.assert_allclose(np.asarray(found)[rows], case.expected(*names)[rows], atol=atol)


def eager(case, names):
    check(case.function(*case.arrays, **case.options(*names)), case, names)


def differentiated(case, names):
    """Outputs under jit, and the derivative in a direction that is nowhere alike."""
    static, traced = split(case.options(*names))
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(B, T, H, D))
    if PADS & set(names):
        weight = weight * VISIBLE[..., None, None]

    def loss(arrays):
        out = case.function(*arrays, **traced, **static)
        return jnp.vdot(weight.astype(np.float32), out), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(case.arrays)
    check(out, case, names)
    ahead = [rng.normal(size=x.shape) for x in case.arrays]
    if case.entry.shared:
        ahead[0] = ahead[1]
        gradient = (0, *gradient[1:])
    found = sum(np.vdot(x, y) for x, y in zip(gradient, ahead, strict=True) if np.ndim(x))
    step = 1e-5
    sides = (
        case.expected(*names, arrays=[x + s * d for x, d in zip(case.arrays, ahead, strict=True)])
        for s in (step, -step)
    )
    high, low = (np.vdot(weight, side) for side in sides)
    np.testing.assert_allclose(found, (high - low) / (2 * step), rtol=2e-4, atol=2e-4)


def vmapped(case, names):
    static, traced = split(case.options(*names))
    axes = {name: None if name in SHARED else 0 for name in traced}
    rows = jax.vmap(lambda arrays, traced: case.function(*arrays, **traced, **static), (0, axes))
    check(jax.jit(rows)(case.arrays, traced), case, names)


def in_module(build):
    """The module's output is that of the same module with the definition in its place."""

    def way(case, names):
        case = dataclasses.replace(case, kv_heads=H)
        inputs = np.random.default_rng(2).normal(size=(B, T, 6)).astype(np.float32)
        options = case.options(*names)
        passed = {name: options.pop(name) for name in build.passes if name in options}

        def defined(query, key, value, **_):
            query = key if case.entry.shared else query
            arrays = [np.asarray(x) for x in (query, key, value)]
            return jnp.asarray(case.expected(*names, arrays=arrays), jnp.float32)

        found = build(functools.partial(case.function, **options), inputs, passed)
        expected = build(defined, inputs, passed)
        rows = VISIBLE if PADS & set(names) else np.ones((B, T), bool)
        np.testing.assert_allclose(found[rows], expected[rows], atol=2e-5)

    return way


def linen_module(attention_fn, inputs, options):
    module = linen.MultiHeadDotProductAttention(H, qkv_features=H * D, attention_fn=attention_fn)
    return module.init_with_output(jax.random.key(0), inputs, **options)[0]


linen_module.passes = ("mask",)


def nnx_module(attention_fn, inputs, options):
    module = nnx.MultiHeadAttention(
        H, inputs.shape[-1], H * D, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0)
    )
    return module(inputs, **options)


nnx_module.passes = ("mask", "is_causal")


def over_a_cache(case, names):
    """The last position alone, over the keys of all; every mask is then one of keys."""
    names = [{"padding": "pairs"}.get(name, name) for name in names]
    names = [name for name in names if name not in ("segment_ids", "query_mask")]
    options = case.options(*names)
    for name in {"mask", "bias"} & set(options):
        options[name] = options[name][..., -1:, :]
    query, key, value = case.arrays
    found = jitted(case.function, (query[:, -1:], key, value), options)
    np.testing.assert_allclose(found, case.expected(*names)[:, -1:], atol=2e-5)


def decoded(case, names):
    """A prompt in two parts, the first padded on the left, and single tokens."""
    told = {name: x for name, x in case.options(*names).items() if name == "projection"}
    prompt, pads = 4, 2
    visible = np.ones((B, prompt), bool)
    visible[1, :pads] = False
    function, arrays = case.function, case.arrays
    state = function.init_state((B,), case.kv_heads, D, D, max_length=T)
    read, step = jax.jit(function.prefill), jax.jit(function.step)
    first, state = read(state, *(x[:, :prompt] for x in arrays), key_mask=visible, **told)
    second, state = read(state, *(x[:, prompt:-1] for x in arrays), **told)
    third, _ = step(state, *(x[:, -1] for x in arrays), **told)
    found = np.concatenate([first, second, third[:, None]], axis=1)
    names = list(told)
    np.testing.assert_allclose(found[0], case.expected(*names)[0], atol=2e-5)
    short = case.expected(*names, arrays=[x[:, pads:] for x in arrays])
    np.testing.assert_allclose(found[1, pads:], short[1], atol=2e-5)


def on_a_mesh(case, names):
    """Rows, heads and, where it can be, positions divided; what needs whole rows is refused."""
    sizes = {"data": 2, "model": 2, "sequence": 2 if case.entry.along_sequence else 1}
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    function = on_mesh(case.function, mesh)
    if case.entry.along_sequence and case.function.takes.mask == "pairs":
        for name in {"pairs", "padding", "key_bias", "pair_bias"}:
            with pytest.raises(ValueError, match="left out if positions are sharded"):
                function(*case.arrays, **case.options(name))
        names = [name for name in names if OPTIONS[name].name not in ("mask", "bias")]
    check(jitted(function, case.arrays, case.options(*names)), case, names)


def built_so(case):
    return case.direction != "is_causal"


def only(direction):
    """Where a function has both directions, one of them shows what the way adds."""
    return lambda case: case.direction == direction or len(case.entry.directions) == 1


WAYS = {
    "eager": (eager, built_so),
    "jit and grad": (differentiated, lambda case: True),
    "vmap": (vmapped, only("causal")),
    "linen": (in_module(linen_module), only("both ways")),
    "nnx": (in_module(nnx_module), lambda case: True),
    "cache": (over_a_cache, lambda case: case.entry.steps),
    "decoding": (decoded, lambda case: case.entry.decodes and case.direction == "causal"),
}
CROSSED = [
    (name, way) for name, case in CASES.items() for way, (_, has) in WAYS.items() if has(case)
]


@pytest.mark.parametrize(("name", "way"), CROSSED, ids=[f"{n}-{w}" for n, w in CROSSED])
def test_all_options_at_once(name, way):
    """The result shows each of them: one that is dropped makes it another one."""
    case = CASES[name]
    WAYS[way][0](case, together(case))


@pytest.mark.eight_devices
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", CASES)
def test_all_options_at_once_on_a_mesh(name):
    on_a_mesh(CASES[name], together(CASES[name]))


# Options that the others take the place of above, and those that are refused.
ALONE = [
    (name, option)
    for name, case in CASES.items()
    for option in OPTIONS
    if case.direction != "is_causal" and option not in together(case)
]


@pytest.mark.parametrize(("name", "option"), ALONE, ids=[f"{n}-{o}" for n, o in ALONE])
def test_other_options_by_themselves(name, option):
    case = CASES[name]
    words = case.entry.refuses.get(option)
    if words is None:
        eager(case, [option])
        return
    with pytest.raises(ValueError, match=words):
        eager(case, [option])
    options = case.options(option)
    if words == NOT_A_MASK_OF_KEYS:
        assert np.isnan(jitted(case.function, case.arrays, options)).all()
        return
    static, traced = split(options)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda traced: case.function(*case.arrays, **traced, **static), traced)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("lsh")])
def test_dropped_weights_are_zero_and_the_others_scaled_up(name):
    """One value a key shows its weight. (Hashed attention drops in each round by itself.)"""
    case, rate = CASES[name], 0.5
    query, key, _ = case.arrays
    arrays = (
        query,
        key,
        np.broadcast_to(np.eye(T, dtype=np.float32)[:, None], (B, T, case.kv_heads, T)),
    )
    static, _ = split(case.options())
    run = functools.partial(case.function, dropout_rate=rate, **static)
    found = np.asarray(jitted(run, arrays, {"dropout_rng": jax.random.key(0)}))
    weights = case.expected(arrays=arrays)
    dropped = found == 0
    np.testing.assert_allclose(found, np.where(dropped, 0, weights / (1 - rate)), atol=2e-5)
    assert dropped[weights > 1e-3].any() and not dropped[weights > 1e-3].all()


@pytest.mark.parametrize("name", CASES)
def test_precision_reaches_every_product(name):
    case = CASES[name]
    static, _ = split(case.options())
    function, precision = case.function, jax.lax.Precision.HIGHEST
    programs = [
        jax.make_jaxpr(functools.partial(function, precision=precision, **static))(*case.arrays)
    ]
    if WAYS["decoding"][1](case):
        state = function.init_state((B,), case.kv_heads, D, D, max_length=T)
        for read, arrays in (
            (function.prefill, case.arrays),
            (function.step, [x[:, 0] for x in case.arrays]),
        ):
            programs.append(
                jax.make_jaxpr(functools.partial(read, precision=precision))(state, *arrays)
            )
    for program in programs:
        products = [x for x in all_equations(program.jaxpr) if x.primitive.name == "dot_general"]
        assert products
        for product in products:
            assert product.params["precision"] == (precision, precision), product


def all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from all_equations(getattr(inner, "jaxpr", inner))


def is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
