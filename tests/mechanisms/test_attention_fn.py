"""What holds for every attention function, whatever its mechanism: the laws of the base class."""

import copy
import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fast_attention as fa
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.wrapped import WrappedAttention
from fast_attention.recipes import FACTORIES, recipe

B, T, H, D = 2, 6, 2, 4
MASK = np.arange(T)[None] < np.array([[T], [4]])


def linear(**options):
    return fa.make_fast_softmax_attention(D, nb_features=8, redraw_features=False, **options)


MAKERS = {
    "linear": linear,
    "near": functools.partial(linear, exact_window=2),
    "tuned": functools.partial(linear, estimator="wderf_s", calibration="stored"),
    "generalized": functools.partial(fa.make_fast_generalized_attention, D),
    "exact": fa.make_softmax_attention,
    "local": functools.partial(fa.make_local_attention, 2),
    "efficient": fa.make_efficient_attention,
    "strided": lambda **options: fa.make_strided_attention(linear(**options), 2),
    "lsh": functools.partial(fa.make_lsh_attention, 2, 2),
}
DECODING = sorted(set(MAKERS) - {"lsh"})
KEYS_ONLY = ["linear", "near", "tuned", "generalized", "efficient", "strided"]


def arrays(name, length=T, batch=B):
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (batch, length, H, D)) for k in keys)
    return (query, query if name == "lsh" else key, value)


@pytest.mark.parametrize("name", MAKERS)
def test_equal_options_make_equal_functions_and_one_program(name):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, *operands):
        traces.append(function)
        return operands[0]

    for _ in range(2):
        run(MAKERS[name](), *arrays(name))
    assert len(traces) == 1
    assert MAKERS[name]() != MAKERS[name](unidirectional=True)


# Functions that jax.jit or jax.custom_jvp made: pickle alone finds the functions inside.
COMPILED = [jnp.exp, jnp.square, jax.nn.sigmoid, jax.nn.relu, jax.nn.elu, jnp.log1p]


@pytest.mark.parametrize(
    "function",
    [make() for make in MAKERS.values()]
    + [fa.make_fast_generalized_attention(kernel_fn=kernel) for kernel in COMPILED],
)
def test_pickled_and_copied_functions_are_equal(function):
    for same in (pickle.loads(pickle.dumps(function)), copy.copy(function)):
        assert same == function and hash(same) == hash(function)
        assert recipe(same) == recipe(function)
    assert copy.deepcopy(function) == function


def test_an_explicit_projection_counts_by_value_and_is_kept_in_training():
    drawn = np.random.default_rng(0).normal(size=(8, D)).astype(np.float32)
    make = functools.partial(fa.make_fast_softmax_attention, D)
    one, same, other = (make(projection_matrix=x) for x in (drawn, drawn.copy(), drawn + 1))
    assert one == same and hash(one) == hash(same) and one != other
    training = one(*arrays("linear"), dropout_rng=jax.random.key(1))
    np.testing.assert_array_equal(training, one(*arrays("linear")))


@pytest.mark.parametrize("name", MAKERS)
def test_what_padding_holds_reaches_no_output_and_no_gradient(name):
    function, shown = MAKERS[name](), MASK[..., None, None]
    masks = {"key_mask": MASK} | ({} if name == "lsh" else {"query_mask": MASK})

    def loss(operands, hidden):
        query, key, value = (jnp.where(shown, x, hidden) for x in operands)
        out = function(key if name == "lsh" else query, key, value, **masks)
        return (jnp.where(shown, out, 0) ** 2).sum()

    gradient = jax.jit(jax.value_and_grad(loss))
    expected = gradient(arrays(name), 0.0)
    for junk in (np.nan, np.inf):
        found = gradient(arrays(name), junk)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", DECODING)
def test_what_queries_of_padding_hold_reaches_no_gradient(name):
    function, shown = MAKERS[name](unidirectional=True), MASK[..., None, None]

    def loss(operands, hidden):
        query = jnp.where(shown, operands[0], hidden)
        out = function(query, *operands[1:], query_mask=MASK)
        return (jnp.where(shown, out, 0) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    found, expected = (gradient(arrays(name), hidden) for hidden in (np.nan, 0.0))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "first"), [("linear", False), ("linear", True), ("near", True), ("tuned", False)]
)
def test_a_state_has_true_units(name, first):
    one, other = (
        MAKERS[name](unidirectional=True, renormalize_attention=r) for r in (first, not first)
    )

    @jax.jit
    def run(operands):
        state = one.init_state((B,), H, D, D)
        _, state = one.prefill(state, *(x[:, :3] for x in operands))
        return other.prefill(state, *(x[:, 3:] for x in operands))[0], other(*operands)

    out, whole = run(arrays(name))
    np.testing.assert_allclose(out, whole[:, 3:], atol=1e-4)


@pytest.mark.parametrize("name", KEYS_ONLY)
def test_a_mask_of_pairs_under_jit_gives_nan_rows(name):
    function, operands = MAKERS[name](), arrays(name)
    padding = MASK[:, None, :, None] & MASK[:, None, None]
    window = np.abs(np.arange(T)[:, None] - np.arange(T)) < 2
    mask = np.stack([padding[0], window[None]])
    with pytest.raises(ValueError, match="is not supported"):
        function(*operands, mask=mask)
    out = jax.jit(lambda mask: function(*operands, mask=mask))(mask)
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize("name", MAKERS)
def test_an_additive_mask_is_refused(name):
    function, operands = MAKERS[name](), arrays(name)
    additive = np.where(MASK, 0.0, -1e9)[:, None, None].astype(np.float32)
    with pytest.raises(ValueError, match="an additive mask goes into bias"):
        function(*operands, mask=additive)
    out = jax.jit(lambda mask: function(*operands, mask=mask))(additive)
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(0, T, H, D), (B, 0, H, D)])
def test_nothing_in_nothing_out(name, shape):
    function, x = MAKERS[name](), jnp.zeros(shape)
    assert function(x, x, x).shape == shape
    assert jax.grad(lambda x: function(x, x, x).sum())(x).shape == shape


BAD = {
    "dropout_rate": [1.0, -0.1, np.nan, True],
    "deterministic": [None],
    "is_causal": [None, 1],
    "broadcast_dropout": [None],
    "key_mask": [MASK[0], MASK[:, 1:], 2 * MASK],
    "segment_ids": [np.zeros((B, T)), np.zeros((B, T + 1), int), np.zeros(T, int)],
    "query_mask": [MASK[:, 1:]],
    "mask": [np.full((T, T), 2), np.ones((B, T), bool)],
    "dtype": [jnp.int32],
    "query": [1.0, None, np.zeros((B, T, H, D), complex), np.zeros((T, H))],
    "axis": [1.0, 2],
    "module": [object()],
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("argument", BAD)
def test_one_check_of_arguments(name, argument):
    function = MAKERS[name]()
    operands = dict(zip(("query", "key", "value"), arrays(name), strict=True))
    for given in BAD[argument]:
        with pytest.raises(ValueError, match=f"{argument}|Operands"):
            function(**operands | {"dropout_rng": jax.random.key(0)} | {argument: given})


FLAGS = [
    (make.__name__, name)
    for make in FACTORIES.values()
    for name, x in inspect.signature(make).parameters.items()
    if x.annotation == "bool"
]


@pytest.mark.parametrize(("factory", "flag"), FLAGS)
@pytest.mark.parametrize("given", [None, 1, 1.5])
def test_flags_of_factories_are_flags(factory, flag, given):
    # What comes first has no default: an attention function, widths, window sizes.
    first = {"make_local_attention": {"window_size": 2}}.get(factory, {})
    with pytest.raises(ValueError, match=f"{flag} must be True or False, got {given}"):
        FACTORIES[factory](**first, **{flag: given})


@pytest.mark.parametrize(
    ("make", "option", "given"),
    [
        (linear, "seed", 1.5),
        (linear, "seed", None),
        (linear, "implementation", "cuda"),
        (linear, "implementation", 3),
        (linear, "numerical_stabilizer", None),
        (linear, "numerical_stabilizer", np.nan),
        (MAKERS["tuned"], "moment_decay", "0.9"),
        (MAKERS["generalized"], "kernel_epsilon", np.nan),
        (MAKERS["generalized"], "kernel_epsilon", None),
        (MAKERS["generalized"], "signed_kernel", 1),
        (MAKERS["lsh"], "scale", np.nan),
        (MAKERS["lsh"], "seed", None),
    ],
)
def test_numbers_of_factories_are_numbers(make, option, given):
    with pytest.raises(ValueError, match=option):
        make(**{option: given})


@pytest.mark.parametrize("name", MAKERS)
def test_whole_numbers_become_floating_ones(name):
    x = jnp.arange(B * T * H * D).reshape(B, T, H, D) % 3
    wide = x.astype(jnp.float32)
    function = MAKERS[name]()
    np.testing.assert_array_equal(function(x, x, x), function(wide, wide, wide))


def test_wrappers_declare_what_the_function_inside_does():
    """A declaration of the base class that a wrapper does not pass on would be lost there."""
    own = {"along_axis", "divides", "start", "read", "read_one", "attend", "mechanism"}
    declared = {name for name in vars(AttentionFn) if not name.startswith("_")} | {"takes"}
    passed_on = {name for name in vars(WrappedAttention) if not name.startswith("_")}
    assert declared - passed_on - own <= {"forward_mode"}
    strided = fa.make_strided_attention(
        linear(estimator="wderf_s", unidirectional=True, moment_decay=0.9), 2
    )
    assert strided.moment_decay == 0.9 and strided.calibration == "stored"
    parameters = strided.draw_projection(jax.random.key(0), D)
    redrawn = strided.redraw_projection(jax.random.key(1), parameters)
    assert (redrawn.rows != parameters.rows).any()


@pytest.mark.parametrize("name", ["linear", "near", "exact", "local", "efficient"])
def test_a_step_of_flax_over_its_cache_is_a_row_of_the_whole(name):
    function = MAKERS[name](unidirectional=True)
    x = jax.random.normal(jax.random.key(0), (1, T, H * D))
    module = nnx.MultiHeadAttention(
        num_heads=H, in_features=H * D, attention_fn=function, decode=False, rngs=nnx.Rngs(0)
    )
    expected = nnx.jit(lambda module: module(x))(module)
    module.init_cache(x.shape)
    step = nnx.jit(lambda module, x: module(x, decode=True))
    steps = [step(module, x[:, t : t + 1]) for t in range(T)]
    np.testing.assert_allclose(np.concatenate(steps, 1), expected, atol=1e-4)


def test_the_signature_has_every_name_that_flax_passes():
    flax = inspect.signature(nnx.dot_product_attention).parameters
    own = inspect.signature(linear()).parameters
    assert set(flax) - {"promote_dtype"} <= set(own)
