"""Runs that begin with the parameters of another one, and models whose attention is exchanged."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import FlaxLM, cli
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.loading import load_run, open_run
from fast_attention.protein_lm.training.added_layers import count_added
from fast_attention.protein_lm.training.initial_run import check_initial_run, read_initial_run

SHORT = functools.partial(make_fast_softmax_attention, nb_features=16, implementation="quadratic")
WDERF = SHORT(estimator="wderf_s", unidirectional=True)
PROTEINS = ["MKTAYIAKQR", "GAVLIMFWPS", "MKKLLPTAAAGLLLLAAQPAMA"]


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def rows(model):
    return model.state.variables["stack"]["blocks"][0][0]["inner"]["projections"][0]


@pytest.fixture(scope="module")
def trained(lm_run):
    return FlaxLM.load(lm_run)


@pytest.fixture
def switching(train_arguments, lm_run, tmp_path):
    """From more settings to the arguments of a run of one step that changes no parameter."""

    def arguments(*bindings):
        return train_arguments(
            tmp_path / "new",
            f"experiment.initial_run = {str(lm_run)!r}",
            "experiment.max_train_steps = 1",
            "experiment.num_samples = 0",
            "FlaxModel.learning_rate = 0.0",
            *bindings,
        )

    return arguments


def test_a_run_begins_with_parameters_and_calibrates_new_features(switching, trained, tmp_path):
    stored = (
        "make_fast_softmax_attention.unidirectional = True",
        "make_fast_softmax_attention.estimator = 'wderf_s'",
    )
    assert cli.main(switching(*stored)) == 0
    model = load_run(tmp_path / "new").model
    assert model.attention_fn.calibration == "stored"
    assert_equal(model.weights, trained.weights)
    assert np.abs(rows(model)["key_shift"]).max() > 0
    # Taken over by the next run, which fits them no second time.
    parameters, variables, drawn = read_initial_run(tmp_path / "new", model)
    assert not drawn
    assert_equal(parameters, model.weights)
    assert_equal(variables, model.state.variables)


def test_what_a_function_drew_is_taken_by_the_same_function_alone(lm_run, trained):
    same = open_run(lm_run).model
    assert_equal(read_initial_run(lm_run, same).variables, trained.state.variables)
    # Of the same shape, but other features.
    other = same.with_attention(SHORT(projection="iid"))
    parameters, variables, drawn = read_initial_run(lm_run, other)
    assert variables is None and drawn
    assert_equal(parameters, trained.weights)
    assert read_initial_run(lm_run, same.with_attention(None)).variables is None


def test_added_layers_keep_the_predictions_and_learn(switching, trained, tmp_path):
    layers = trained.config.num_layers
    more = f"FlaxModel.num_layers = {layers + 2}"
    assert cli.main(switching(more)) == 0
    grown = load_run(tmp_path / "new").model
    assert grown.num_parameters > trained.num_parameters
    old, new = (m.logits(PROTEINS) for m in (trained, grown))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), old, new)
    # Projections are those of the run and a copy, for the same attention function.
    assert_equal(rows(grown), rows(trained))
    before = jax.tree.map(np.asarray, grown.weights["stack"]["blocks"])
    learning = grown.with_attention(grown.attention_fn, learning_rate=0.01)
    learning.fit(PROTEINS, batch_size=3)
    after = learning.weights["stack"]["blocks"]
    for layer in (layers, layers + 1):
        attention, feed_forward = (before[layer][i]["inner"] for i in (0, 1))
        assert not attention["out"]["kernel"].any() and not feed_forward["down"]["kernel"].any()
        assert np.asarray(after[layer][0]["inner"]["out"]["kernel"]).any()
        assert np.asarray(after[layer][1]["inner"]["down"]["kernel"]).any()


@pytest.fixture
def shaped(lm_run, tmp_path):
    """From numbers of layers and a seed to an untrained model that is else that of the run."""

    def model(num_layers, exact_layers, seed):
        about = json.loads((lm_run / "model.json").read_text())
        about["transformer"] |= {"num_layers": num_layers, "exact_layers": list(exact_layers)}
        about["optimizer"]["random_seed"] = seed
        folder = tmp_path / f"{num_layers}_{seed}"
        folder.mkdir()
        (folder / "model.json").write_text(json.dumps(about))
        return open_run(folder).model

    return model


@pytest.mark.parametrize(("before", "now"), [((1,), (1, 3)), ((2,), (2,)), ((), (3,))], ids=str)
def test_added_layers_may_be_exact_where_the_last_is_not(shaped, tmp_path, before, now):
    old, new = shaped(2, before, 1), shaped(3, now, 2)
    old.save(tmp_path / "old")
    parameters, variables, drawn = read_initial_run(tmp_path / "old", new)
    assert not drawn
    new.set_parameters(parameters, variables)
    pairs = zip(old.logits(PROTEINS), new.logits(PROTEINS), strict=True)
    for expected, found in pairs:
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_layer_that_was_exact_draws_alone(shaped, tmp_path):
    old, new = shaped(2, (2,), 1), shaped(2, (), 2)
    old.save(tmp_path / "old")
    _, variables, drawn = read_initial_run(tmp_path / "old", new)
    assert drawn
    blocks, kept, own = (
        tree["stack"]["blocks"] for tree in (variables, old.state.variables, new.state.variables)
    )
    assert_equal(blocks[0], kept[0])
    assert_equal(blocks[1], own[1])


@pytest.mark.parametrize(
    ("number", "after", "told"),
    [(1, False, "layers cannot be removed"), (3, True, "with norm_after, none can be added")],
)
def test_numbers_of_layers_that_cannot_be_had_are_told(shaped, tmp_path, number, after, told):
    shaped(2, (), 1).save(tmp_path / "old")
    new = shaped(number, (), 2)
    new.config = dataclasses.replace(new.config, norm_after=after)
    with pytest.raises(RunError, match=f"has 2 layers, and this model {number}: {told}"):
        check_initial_run(tmp_path / "old", new)


def test_no_layer_is_silent_behind_a_norm_of_the_stream(trained):
    config = trained.config
    deeper = dataclasses.replace(config, num_layers=config.num_layers + 2)
    assert count_added(config, deeper) == 2
    assert count_added(config, dataclasses.replace(deeper, norm_after=True)) == 0
    assert count_added(deeper, config) == 0


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("FlaxModel.mlp_dim = 48", "do not fit this model"),
        ("make_protein_domain.include_mask = False", "other tokens"),
        ("experiment.initial_run = 'nowhere'", "no such folder"),
        ("experiment.calibration_batches = 2", "no stored parameters"),
    ],
)
def test_what_cannot_begin_there_is_refused(switching, setting, told, tmp_path, capsys):
    assert cli.main(switching(setting)) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_loaded_model_becomes_another(trained):
    switched = trained.with_attention(WDERF, learning_rate=0.01)
    assert type(switched) is FlaxLM and switched.schedule(5) == 0.01
    assert_equal(switched.weights, trained.weights)
    before = rows(switched)
    switched.calibrate(PROTEINS, batch_size=3)
    after = rows(switched)
    assert_equal(after["rows"], before["rows"])
    assert np.abs(after["key_shift"]).max() > 0
    kept = jax.tree.map(np.asarray, trained.weights)
    switched.fit(PROTEINS, batch_size=3)
    assert int(switched.state.step) == 1
    assert_equal(trained.weights, kept)
    with pytest.raises(ValueError, match="there is no batch"):
        switched.calibrate(PROTEINS, num_batches=0)
    with pytest.raises(ValueError, match="nothing to calibrate|no attention with stored"):
        trained.calibrate(PROTEINS)
