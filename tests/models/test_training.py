"""A step of training with accumulated gradients is one with the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from fast_attention.layers import Projection, fix_projections, redraw_due, redraw_every
from fast_attention.models import PerformerLM, ReformerLM, next_token_loss
from fast_attention.models.training import make_train_step
from tests.models.cases import LM, build, tokens

SMALL = LM | {"depth": 1, "causal": True}
# Rows of 9, 4, 2 and 6 tokens: parts of two rows count differently many.
LENGTHS = np.array([[9], [4], [2], [6]])
TOKENS = np.where(np.arange(9)[None] < LENGTHS, tokens(4, 9), -1)


def loss(model, batch, rngs):
    return next_token_loss(model, batch, ignore_index=-1, deterministic=rngs is None, rngs=rngs)


def trained(model, accumulate, steps=1, rngs=None):
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    step = make_train_step(loss, accumulate=accumulate)
    losses = [float(step(model, optimizer, jnp.asarray(TOKENS), rngs)) for _ in range(steps)]
    return losses, jax.tree.leaves(nnx.state(model, nnx.Param))


def test_parts_of_a_batch_add_up_to_it_however_they_are_padded():
    whole, parameters = trained(build(PerformerLM, **SMALL), 1)
    parts, accumulated = trained(build(PerformerLM, **SMALL), 2)
    before = jax.tree.leaves(nnx.state(build(PerformerLM, **SMALL), nnx.Param))
    expected = nnx.jit(loss)(build(PerformerLM, **SMALL), TOKENS, None)[0]
    np.testing.assert_allclose([*whole, *parts], float(expected), rtol=1e-5)
    for a, b, old in zip(accumulated, parameters, before, strict=True):
        limit = 1e-5 * np.abs(b - old).max()
        np.testing.assert_allclose(a - old, b - old, atol=limit + 1e-6)
        assert np.any(a != old)


def test_it_learns_and_draws_other_dropout_for_each_part_and_step():
    drop = {"ff_dropout": 0.5, "emb_dropout": 0.5}
    same = jnp.asarray(np.repeat(TOKENS[:1], 4, axis=0))
    seen = []

    def noted(model, batch, rngs):
        mean, count = loss(model, batch, rngs)
        jax.debug.callback(lambda x: seen.append(float(x)), mean)
        return mean, count

    model = build(PerformerLM, **(SMALL | drop))
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=nnx.Param)
    step = make_train_step(noted, accumulate=4)
    rngs = nnx.Rngs(0)
    for _ in range(2):
        step(model, optimizer, same, rngs)
    jax.effects_barrier()
    assert len(set(seen)) == len(seen) == 8

    model = nnx.clone(model)
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)
    step = make_train_step(loss)
    losses = [float(step(model, optimizer, jnp.asarray(TOKENS), None)) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_running_statistics_of_memory_follow_all_parts_in_turn():
    options = SMALL | {"pkm_layers": 1, "pkm_num_keys": 3, "use_full_attn": True, "ff_chunks": 1}
    model = build(ReformerLM, **options)
    before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.BatchStat))]
    one = nnx.clone(model)
    for part in np.split(TOKENS, 2):
        nnx.jit(loss)(one, part, nnx.Rngs(0))
    trained(model, 2, rngs=nnx.Rngs(0))
    after, expected = (jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (model, one))
    for old, new, want in zip(before, after, expected, strict=True):
        assert np.all(new != old)
        np.testing.assert_allclose(new, want, rtol=1e-4)


def test_features_are_redrawn_every_few_steps_and_by_nothing_else():
    model = build(PerformerLM, **SMALL, feature_redraw_interval=2)
    interval = model.stack.config.redraw_interval
    assert interval == 2

    def drawn():
        return np.concatenate([x.ravel() for x in jax.tree.leaves(nnx.state(model, Projection))])

    first = drawn()
    trained(model, 1)
    np.testing.assert_array_equal(drawn(), first)
    redrew = [redraw_every(model, interval, step, nnx.Rngs(step)) for step in range(4)]
    assert redrew == [False, False, True, False] and np.all(drawn() != first)
    assert not redraw_every(model, None, 2, nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 1, or None for never, got 0"):
        redraw_every(model, 0, 2, nnx.Rngs(0))


def test_stacks_redraw_by_their_own_interval_until_they_are_fixed():
    model = build(PerformerLM, **SMALL, feature_redraw_interval=2)
    drawn = [redraw_due(model, step, nnx.Rngs(step)) for step in range(4)]
    assert drawn == [False, False, True, False]
    fix_projections(model)
    assert not redraw_due(model, 2, nnx.Rngs(0))
    assert not redraw_due(build(PerformerLM, **SMALL, auto_check_redraw=False), 1000, nnx.Rngs(0))


def test_what_cannot_be_cut_is_an_error():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_train_step(loss, accumulate=0)
    with pytest.raises(ValueError, match="accumulate=3 must divide .* 4"):
        trained(build(PerformerLM, **SMALL), 3)


def test_what_is_drawn_is_saved_with_the_model(tmp_path):
    options = SMALL | {"feature_redraw_interval": None}
    model, other = (PerformerLM(rngs=nnx.Rngs(seed), **options) for seed in (0, 1))
    again = PerformerLM(rngs=nnx.Rngs(0), **options)
    run = nnx.jit(lambda model: model(jnp.maximum(TOKENS, 0)))
    before = run(model)
    np.testing.assert_array_equal(run(again), before)
    assert np.any(run(other) != before)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / "model", nnx.state(other)))
    np.testing.assert_array_equal(run(other), before)
