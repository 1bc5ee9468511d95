"""Laws of local attention; the definition below is what tiles of every size must reproduce."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.mechanisms.call import Dropout
from fast_attention.mechanisms.local.blocks import Tiling, tiled_attention
from fast_attention.mechanisms.local.op import local_attention
from fast_attention.mechanisms.local.tile import Choices, Sight
from fast_attention.mechanisms.local.window import LocalWindow
from tests.leaks import checking_leaks

LENGTH = 13


def local(
    *arrays,
    window_size=4,
    causal=False,
    look_backward=1,
    look_forward=None,
    exact_window=False,
    **options,
):
    """Local attention with the fields of its window as keywords."""
    window = LocalWindow(window_size, causal, look_backward, look_forward, exact_window)
    return local_attention(*arrays, window, **options)


def visible(length, window, *, causal=False, back=1, ahead=None, exact=False):
    """``[T, T]``: which key (column) each query (row) sees."""
    ahead = ahead if ahead is not None else 0 if causal else 1
    t, s = np.arange(length)[:, None], np.arange(length)[None]
    seen = (s // window >= t // window - back) & (s // window <= t // window + ahead)
    if causal:
        seen &= s <= t
    if exact:
        seen &= (t - s <= window * back) & (s - t <= window * ahead)
    return seen


@functools.partial(jax.jit, static_argnames="shared_qk")
def definition(query, key, value, *, seen, shared_qk=False, bias=0.0):
    """Softmax over what is seen, ``[*, T, H, V]``; zeros where nothing is."""
    group = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
    if shared_qk:
        key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    logits = jnp.einsum("...thd,...shd->...hts", query, key) / np.sqrt(query.shape[-1])
    logits = logits + jnp.broadcast_to(bias, logits.shape)
    seen = jnp.broadcast_to(seen, logits.shape)
    if shared_qk:
        own = jnp.broadcast_to(np.eye(query.shape[-3], dtype=bool), logits.shape)
        logits = jnp.where(own, -5e4, logits)
    largest = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True, where=seen, initial=-1e5))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - largest, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("...hts,...shv->...thv", weights / jnp.where(total == 0, 1, total), value)


def inputs(*batch, length=LENGTH, heads=4, kv_heads=2, width=6, value_width=5):
    random = np.random.default_rng(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    return tuple(
        jnp.asarray(random.standard_normal((*batch, length, *shape)).astype(np.float32))
        for shape in shapes
    )


def close(actual, expected, tolerance=2e-6):
    np.testing.assert_allclose(actual, expected, rtol=tolerance * 10, atol=tolerance)


def values_and_gradients(function, *args):
    """Output, and the gradients of a sum in which every entry of it counts."""

    def loss(*args):
        out = function(*args)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    argnums = tuple(range(len(args)))
    gradients, out = jax.jit(jax.grad(loss, argnums, has_aux=True))(*args)
    return out, *gradients


def agree(function, expected, *args, tolerance=1e-5):
    for actual, wanted in zip(
        values_and_gradients(function, *args), values_and_gradients(expected, *args), strict=True
    ):
        close(actual, wanted, tolerance)


@pytest.mark.parametrize(
    ("batch", "length", "window", "options"),
    [
        ((), LENGTH, 4, {}),
        ((2,), 1, 4, {}),
        ((2, 1), 12, 3, {"look_backward": 2, "look_forward": 0}),
        ((), LENGTH, 3, {"exact_window": True, "causal": True, "look_backward": 2}),
        ((), LENGTH, 5, {"shared_qk": True}),
        ((2,), LENGTH, 4, {"shared_qk": True, "causal": True}),
        ((), 5, 7, {"causal": True}),
    ],
)
def test_equals_the_definition_with_its_gradients(batch, length, window, options):
    seen = visible(
        length,
        window,
        causal=options.get("causal", False),
        back=options.get("look_backward", 1),
        ahead=options.get("look_forward"),
        exact=options.get("exact_window", False),
    )
    attend = functools.partial(local, window_size=window)
    agree(
        functools.partial(attend, **options),
        functools.partial(definition, seen=seen, shared_qk=options.get("shared_qk", False)),
        *inputs(*batch, length=length),
    )


@pytest.mark.parametrize(
    ("tiling", "block", "causal"),
    [
        (Tiling(4, 1), 4, True),
        (Tiling(10, 4 * 8 * 16 * 2), 4, False),
        (Tiling(2, 400), 4, False),
        (Tiling(6, 10**6), 1, False),
    ],
)
def test_no_tiling_changes_a_value(tiling, block, causal):
    """Of tiles that hold blocks, parts of blocks, and both; one row at a time and several."""
    rows, window = 3, 4
    random = np.random.default_rng(1)
    key_mask = random.random((rows, LENGTH)) < 0.7
    mask = random.random((1, 4, LENGTH, LENGTH)) < 0.8
    bias = jnp.asarray(random.standard_normal((rows, 1, LENGTH, LENGTH)).astype(np.float32))
    seen = visible(LENGTH, window, causal=causal, exact=block == 1)
    first = np.argmax(seen, axis=1)[None]
    last = LENGTH - 1 - np.argmax(seen[:, ::-1], axis=1)[None]
    sight = Sight(*(jnp.asarray(x) for x in (first, last, key_mask, mask)))
    choices = Choices(block, back=window, ahead=0 if causal else window, causal=causal)

    def attend(bias, query, key, value):
        full = sight._replace(bias=bias)
        return tiled_attention(query, key, value, full, None, choices, tiling)

    def expected(bias, query, key, value):
        allowed = seen[None, None] & key_mask[:, None, None] & mask
        return definition(query, key, value, seen=allowed, bias=bias)

    agree(attend, expected, bias, *inputs(rows))


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_at_a_length_of_many_tiles(causal):
    arrays = inputs(1, length=331, heads=2, kv_heads=1)
    seen = visible(331, 24, causal=causal)
    attend = functools.partial(local, window_size=24)
    agree(
        functools.partial(attend, causal=causal),
        functools.partial(definition, seen=seen),
        *arrays,
        tolerance=2e-5,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_future_leaves_the_past_bit_equal(dtype):
    arrays = [x.astype(dtype) for x in inputs(2)]
    later = jnp.arange(LENGTH)[None, :, None, None] > 5
    changed = [jnp.where(later, x * 1e4, x) for x in arrays]
    attend = jax.jit(functools.partial(local, window_size=4, causal=True))
    before, after = attend(*arrays), attend(*changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.array_equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("shared_qk", [False, True])
def test_masked_is_truncated(shared_qk):
    attend = functools.partial(local, window_size=4, shared_qk=shared_qk)
    arrays, kept = inputs(2), 7
    key_mask = jnp.broadcast_to(jnp.arange(LENGTH)[None] < kept, (2, LENGTH))

    def masked(*arrays):
        return attend(*arrays, key_mask=key_mask)[:, :kept]

    short = values_and_gradients(attend, *(x[:, :kept] for x in arrays))
    for actual, wanted in zip(values_and_gradients(masked, *arrays), short, strict=True):
        close(actual[:, :kept], wanted, 1e-5)
        assert not actual[:, kept:].any()


@pytest.mark.parametrize("shared_qk", [False, True])
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(shared_qk):
    attend = functools.partial(
        local,
        window_size=4,
        shared_qk=shared_qk,
        key_mask=jnp.zeros((2, LENGTH), bool),
    )
    for x in values_and_gradients(attend, *inputs(2)):
        np.testing.assert_array_equal(x, 0)


def test_the_own_key_is_the_last_resort():
    """The first position of a causal sequence sees itself alone: its output is its value."""
    query, key, value = inputs(2, kv_heads=4)
    attend = jax.jit(functools.partial(local, window_size=4, causal=True, shared_qk=True))
    out = attend(query, key, value)
    np.testing.assert_array_equal(out[:, 0], value[:, 0])
    changed = attend(query, key, value.at[:, 3].add(1e6))
    np.testing.assert_array_equal(changed[:, 3], out[:, 3])
    gradient = jax.grad(lambda key: jnp.sum(attend(query, key, value)))
    assert jnp.isfinite(gradient(jnp.zeros_like(key))).all()


@pytest.mark.parametrize("causal", [False, True])
def test_segments_see_themselves_alone(causal):
    ids = np.asarray([[4] * 5 + [2] * 1 + [4] * 7, [0] * 13])
    run = np.cumsum(np.diff(ids, prepend=ids[:, :1]) != 0, axis=1)
    seen = visible(LENGTH, 4, causal=causal) & (run[:, :, None] == run[:, None])
    arrays = inputs(2)
    out = local(*arrays, window_size=4, causal=causal, segment_ids=jnp.asarray(ids))
    close(out, definition(*arrays, seen=seen[:, None]))


def test_low_precision_inputs_are_summed_in_float32():
    arrays = inputs(2)
    attend = functools.partial(local, window_size=4)
    out = jax.jit(attend)(*(x.astype(jnp.bfloat16) for x in arrays))
    assert out.dtype == jnp.bfloat16
    exact = definition(*arrays, seen=visible(LENGTH, 4))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.05)
    for dtype in (jnp.bfloat16, jnp.float16):
        large = [(100 * x).astype(dtype) for x in arrays]
        for x in values_and_gradients(attend, *large):
            assert np.isfinite(np.asarray(x, np.float32)).all()


def test_memory_grows_with_the_length_times_the_window(optimized):
    def temporary_bytes(length):
        arrays = inputs(1, length=length, heads=1, kv_heads=1, width=16, value_width=16)

        def loss(*arrays):
            return jnp.sum(local(*arrays, window_size=128))

        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2**14), temporary_bytes(2**15)
    assert long < 2**30 * 4 / 50
    assert long < 2.2 * short


class TestDropout:
    def test_keeps_the_mean_and_scales_what_is_kept(self):
        arrays = inputs(1, length=4, heads=1, kv_heads=1)
        attend = functools.partial(local, *arrays, window_size=2)

        @jax.jit
        @jax.vmap
        def sample(key):
            return attend(dropout=Dropout(key, 0.25, False))

        keys = jax.random.split(jax.random.key(0), 1000)
        samples = np.asarray(sample(keys))
        error = np.std(samples, axis=0) / np.sqrt(len(keys))
        assert (np.abs(samples.mean(0) - attend()) < 5 * error).all()
        assert (error > 0).all()

    @pytest.mark.parametrize("broadcast", [False, True])
    def test_is_shared_by_batch_and_heads_on_request(self, broadcast):
        query, key, value = (jnp.broadcast_to(x[:1, :, :1], x.shape) for x in inputs(3))
        choices = Choices(4, 4, 0, causal=True, dropout_rate=0.5, share_dropout=broadcast)
        position = jnp.arange(LENGTH)[None]
        sight = Sight(jnp.maximum(position // 4 * 4 - 4, 0), position)
        out = tiled_attention(query, key, value, sight, jax.random.key(0), choices, Tiling(4, 1))
        assert np.allclose(out, out[:1, :, :1], atol=1e-6) == broadcast


def test_leaks_no_tracer_under_jit_grad_vmap_and_remat():
    arrays = inputs(2)
    attend = functools.partial(local, window_size=4, causal=True)
    with checking_leaks():
        batched = jax.jit(jax.vmap(jax.checkpoint(attend)))
        close(batched(*arrays), attend(*arrays))
        jax.jit(functools.partial(values_and_gradients, attend))(*arrays)


def test_no_position_is_no_error():
    assert local(*inputs(2, length=0), window_size=4).shape == (2, 0, 4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size must be a positive whole number, got 0"),
        ({"look_backward": -1}, "look_backward must be"),
        ({"causal": True, "look_forward": 1}, "cannot look forward"),
        ({"mask": jnp.ones((3, LENGTH), bool)}, "mask must be broadcastable"),
        ({"bias": jnp.ones((3, 1, 1, LENGTH))}, "bias must be broadcastable"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        local(*inputs(2), **({"window_size": 4} | options))


def test_options_by_name_are_those_of_the_window():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 9, 2, 4))
    np.testing.assert_array_equal(
        local_attention(query, key, value, window_size=2, causal=True),
        local_attention(query, key, value, LocalWindow(2, causal=True)),
    )
