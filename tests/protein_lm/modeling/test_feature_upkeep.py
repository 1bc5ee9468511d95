"""Random features of a model in training: redrawn, fitted again, trained."""

import functools

import jax
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.feature_maps import HedgehogParameters, TrainedParameters
from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.modeling.optimizer import decay_mask
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.runs import checkpoints

DOMAIN = make_protein_domain(length=12)
TOY = ["MKTAYIAK", "ACDEF", "WWWWHHHHGG"]
tuned = functools.partial(
    make_fast_softmax_attention,
    nb_features=8,
    estimator="wderf_s",
    projection="orthogonal_antithetic",
    unidirectional=True,
)


def make(attention_fn, **options):
    sizes = {"emb_dim": 16, "num_heads": 2, "num_layers": 1, "qkv_dim": 16, "mlp_dim": 32}
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    return FlaxLM(DOMAIN, attention_fn=attention_fn, batch_size=4, **sizes, **rates, **options)


def held(model):
    """What the attention layer holds, by name."""
    (projections,) = (
        node["projections"][0]
        for node in jax.tree.leaves(
            model.state.variables, is_leaf=lambda x: isinstance(x, dict) and "projections" in x
        )
        if isinstance(node, dict)
    )
    return jax.tree.map(np.asarray, projections)


def test_features_follow_their_intervals():
    """Every second step new parameters from running averages, every third new rows."""
    options = {"recalibrate_interval": 2, "redraw_interval": 3}
    model = make(tuned(moment_decay=0.5), **options)
    states = [held(model)]
    for _ in range(3):
        model.fit(TOY, max_steps=1)
        states.append(held(model))
    same = [
        {name: np.array_equal(a[name], b[name]) for name in ("rows", "query_shift")}
        for a, b in zip(states, states[1:], strict=False)
    ]
    assert same[0] == {"rows": True, "query_shift": True}
    assert same[1] == {"rows": True, "query_shift": False}
    # What is redrawn follows the averages, too.
    assert same[2] == {"rows": False, "query_shift": False}


def test_recalibration_without_running_averages_is_refused():
    model = make(tuned(), recalibrate_interval=2)
    with pytest.raises(ValueError, match="keeps no running moments.*moment_decay"):
        model.fit(TOY, max_steps=1)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"calibration": "trained"}, set(TrainedParameters._fields) - {"rows"}),
        ({"estimator": "darkformer"}, {"matrix"}),
        (
            {"estimator": "hedgehog", "projection": None, "exact_window": 2},
            set(HedgehogParameters._fields),
        ),
    ],
    ids=["wderf_s", "darkformer", "hedgehog"],
)
def test_trained_parameters_are_trained_saved_and_not_decayed(tmp_path, options, names):
    model = make(tuned(**options))
    before = jax.tree.map(np.asarray, model.state.parameters)
    model.fit(TOY, max_steps=1)
    after = jax.tree.map(np.asarray, model.state.parameters)
    flat, _ = jax.tree_util.tree_flatten_with_path(decay_mask(after))
    decayed = {jax.tree_util.keystr(path): decays for path, decays in flat}
    paths = [path for path in decayed if "projections" in path]
    assert {path.split("'")[-2] for path in paths} == names
    assert not any(decayed[path] for path in paths)
    old, new = (
        {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_flatten_with_path(t)[0]}
        for t in (before, after)
    )
    assert all(not np.array_equal(old[path], new[path]) for path in paths)
    with checkpoints.open_checkpoints(tmp_path / "checkpoints") as manager:
        checkpoints.save(manager, model.state, checkpoints.Progress({}, 4, 0, 0.0), keep=1)
    _, parameters, variables = checkpoints.restore_model(
        tmp_path / "checkpoints", model.abstract_state
    )
    other = make(tuned(**options))
    other.set_parameters(parameters, variables)
    np.testing.assert_array_equal(other.logits(TOY), model.logits(TOY))


def test_trained_features_are_calibrated_in_a_model_with_an_average():
    """Both have them, in arrays of their own."""
    model = make(tuned(calibration="trained"), ema_decay=0.5)
    before = model.logits(TOY)
    model.calibrate(TOY)
    assert not np.array_equal(model.logits(TOY), before)
    model.fit(TOY, max_steps=1)
    assert model.step == 1
