import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.finetune import lora, tuning_loop
from fast_attention.protein_lm.finetune.finetuned import with_parameters
from fast_attention.protein_lm.finetune.finetuning import FineTuned, fine_tune
from fast_attention.protein_lm.finetune.linear_head import LinearHead
from fast_attention.protein_lm.finetune.tuning_config import TuningConfig
from fast_attention.protein_lm.modeling.encoding import encode_sequences
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES: dict[str, Any] = {
    "emb_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "qkv_dim": 16,
    "mlp_dim": 32,
}
SMALL: dict[str, Any] = {"batch_size": 16, "max_epochs": 2, "rank": 2}
HYDROPHOBIC = set("AVILMFWC")


def make(model_class: Any = FlaxLM, **options: Any):
    return model_class(make_protein_domain(length=40), **(SIZES | options))


@pytest.fixture(scope="module")
def lm():
    return make()


@pytest.fixture(scope="module")
def proteins():
    """Proteins that differ in length and in how hydrophobic they are, so much that it shows."""
    rng = np.random.default_rng(0)
    letters = np.array(list("AVILMFWCDEKRNQSTGHPY"))
    found = []
    for share in rng.uniform(0.1, 0.4, 120) + 0.5 * rng.integers(0, 2, 120):
        weights = np.where(np.isin(letters, list(HYDROPHOBIC)), share / 8, (1 - share) / 12)
        found.append("".join(rng.choice(letters, rng.integers(20, 33), p=weights)))
    return found


@pytest.fixture(scope="module")
def shares(proteins):
    return [sum(letter in HYDROPHOBIC for letter in p) / len(p) for p in proteins]


def leaves(model):
    return jax.tree.leaves(jax.device_get((model.state.parameters, model.state.variables)))


@pytest.fixture(scope="module")
def adapted(lm, proteins, shares):
    return fine_tune(lm, proteins, shares, task="regression", method="lora", **SMALL)


@pytest.fixture(scope="module")
def whole(lm, proteins, shares):
    names = ["oily" if share > 0.5 else "watery" for share in shares]
    return fine_tune(lm, proteins, names, task="classification", method="full", **SMALL)


@pytest.fixture(scope="module")
def moved(lm, adapted):
    """With adapters that do something, whether or not training found that good."""
    adapters, scale = adapted.adapters
    rng = np.random.default_rng(0)
    adapters = {
        name: pair | {"b": jnp.asarray(rng.normal(0, 0.1, pair["b"].shape), jnp.float32)}
        for name, pair in adapters.items()
    }
    parameters = lora.merge_adapters(lm.state.parameters, adapters, scale)
    model = with_parameters(lm, parameters, lm.state.variables)
    return dataclasses.replace(adapted, model=model, adapters=(adapters, scale))


@pytest.mark.parametrize("model_class", [FlaxLM, FlaxBERT])
def test_a_frozen_trunk_tells_what_its_vectors_hold(model_class, proteins, shares):
    model = make(model_class)
    before = leaves(model)
    tuned = fine_tune(model, proteins, shares, task="regression")
    assert tuned.fit is not None
    for now, then in zip(leaves(tuned.model), before, strict=True):
        np.testing.assert_array_equal(now, then)
    measured = tuned.fit.metrics["test"]
    assert measured["spearman"] > 0.9 and measured["r2"] > 0.8
    assert measured["rmse"] < 0.5 * measured["rmse_of_mean"]
    test = np.flatnonzero(tuned.fit.parts == "test")
    assert len(test) == measured["proteins"] == 24
    again = tuned.outputs([proteins[row] for row in test])
    np.testing.assert_allclose(again, tuned.fit.outputs[test], rtol=1e-4, atol=1e-4)


def test_compositions_are_classified(lm, proteins, shares):
    names = ["oily" if share > 0.5 else "watery" for share in shares]
    tuned = fine_tune(lm, proteins, names, task="classification", balanced=True)
    assert tuned.fit is not None
    measured = tuned.fit.metrics["test"]
    assert measured["accuracy"] > 0.85 > measured["accuracy_of_majority"]
    assert measured["macro_f1"] > 0.85
    assert np.sum(measured["confusion"]) == measured["proteins"]
    assert tuned.classes == ("oily", "watery")
    np.testing.assert_allclose(tuned.outputs(proteins[:3]).sum(-1), 1)
    assert set(tuned.predict(proteins)) == {"oily", "watery"}


def test_a_class_that_is_not_trained_on_has_no_weight_of_its_own(lm, proteins):
    """Balancing classes of equal size changes nothing, whatever else is validated on."""
    names = ["a", "b"] * 59 + ["c", "d"]
    parts = ["train"] * 100 + ["valid"] * 20
    plain, balanced = (
        fine_tune(lm, proteins, names, task="classification", parts=parts, balanced=balanced)
        for balanced in (False, True)
    )
    assert plain.fit is not None and balanced.fit is not None
    assert balanced.fit.history == plain.fit.history
    np.testing.assert_array_equal(balanced.fit.outputs, plain.fit.outputs)


def test_adapters_at_zero_are_the_trunk(lm, proteins):
    adapters = lora.init_adapters(lm.state.parameters, 2, jax.random.key(0))
    assert len(adapters) == 6
    assert all(np.asarray(pair["a"]).any() for pair in adapters.values())
    merged = lora.merge_adapters(lm.state.parameters, adapters, 8.0)
    for one, other in zip(*map(jax.tree.leaves, (merged, lm.state.parameters)), strict=True):
        np.testing.assert_array_equal(one, other)
    name, pair = next(iter(adapters.items()))
    adapters[name] = pair | {"b": np.ones_like(pair["b"])}
    changed = lora.merge_adapters(lm.state.parameters, adapters, 0.5)
    expected = 0.5 * np.asarray(pair["a"]).sum(-1, keepdims=True)
    node, was = changed, lm.state.parameters
    for part in name.split("."):
        key = int(part) if part.isdigit() else part
        node, was = node[key], was[key]
    np.testing.assert_allclose(node - was, np.broadcast_to(expected, was.shape), atol=1e-6)
    with pytest.raises(ValueError, match="no 'stack.other'"):
        lora.merge_adapters(lm.state.parameters, {"stack.other": pair}, 1.0)


def test_adapters_from_a_file_are_those_in_memory():
    """Bit by bit: NumPy rounds products in another way than JAX."""
    rng = np.random.default_rng(0)
    drawn = {"a": rng.normal(size=(96, 24)), "b": rng.normal(size=(24, 96))}
    stored = {name: array.astype(np.float32) for name, array in drawn.items()}
    parameters = {"up": {"kernel": jnp.zeros((96, 96))}}
    memory, file = (
        lora.merge_adapters(parameters, {"up.kernel": pair}, 2.0)["up"]["kernel"]
        for pair in (jax.tree.map(jnp.asarray, stored), stored)
    )
    np.testing.assert_array_equal(memory, file)


@pytest.mark.parametrize("rank", [2, None])
def test_gradient_steps_train_what_they_should(lm, proteins, shares, rank):
    """On numbers and on classes, with the programs of `adapted` and `whole`."""
    residues = list(encode_sequences(lm, proteins[:32]))
    mean, scale = np.zeros(16, np.float32), np.ones(16, np.float32)
    targets, outputs = (np.array(shares[:32], np.float32) - 0.5) / 0.3, 1
    if not rank:
        targets, outputs = (targets > 0).astype(np.int32), 2
    kernel, bias = np.zeros((16, outputs), np.float32), np.zeros(outputs, np.float32)
    head = LinearHead(mean, scale, kernel, bias)
    rows: list[dict[str, Any]] = []
    config = TuningConfig(
        method="lora" if rank else "full",
        rank=rank or 1,
        alpha=4.0 * (rank or 1),
        learning_rate=0.01,
        max_epochs=4,
        patience=1,
        batch_size=SMALL["batch_size"],
    )

    def validate(parameters: Any, head: LinearHead) -> dict[str, float]:
        return {"loss": -float(len(rows))}  # The last epoch is the best.

    before = tuning_loop.make_trunk(lm, config)
    trained, found = tuning_loop.tune(
        lm, residues, targets, np.ones(32), head, before, config, validate, rows.append
    )
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    assert found.kernel.any() and not np.asarray(head.kernel).any()
    old, new = (
        dict(jax.tree_util.tree_leaves_with_path(tuning_loop.trunk_parameters(lm, part, 4.0)))
        for part in (before, trained)
    )
    changed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in old.items()
        if (np.asarray(leaf) != np.asarray(new[path])).any()
    }
    kernels = {name for name in lora.init_adapters(lm.state.parameters, 1, jax.random.key(0))}
    # Logits are not asked for, so that their layer has no gradient.
    assert changed == kernels if rank else changed > kernels | {"embed.embedding", "norm.scale"}


def test_gradient_steps_begin_at_the_frozen_solution_and_keep_the_best(
    adapted, lm, proteins, shares
):
    frozen, begin, *later = [row for row in adapted.fit.history if row["split"] != "train"]
    assert frozen["split"] == "frozen" and begin["epoch"] == 0
    assert begin["loss"] == pytest.approx(frozen["loss"], rel=1e-3)
    assert [row["epoch"] for row in later] == [1, 2]
    best = min(row["loss"] for row in [begin, *later])
    valid = np.flatnonzero(adapted.fit.parts == "valid")
    spread = np.std([shares[row] for row in np.flatnonzero(adapted.fit.parts == "train")])
    residual = np.array([shares[row] for row in valid]) - adapted.fit.outputs[valid]
    assert np.mean((residual / spread) ** 2) == pytest.approx(best, rel=1e-3)
    assert adapted.fit.metrics["test"]["spearman"] > 0.9


def test_the_trained_trunk_is_validated_also_where_averages_are_kept(adapted, proteins, shares):
    averaging = make(ema_decay=0.9)
    tuned = fine_tune(averaging, proteins, shares, task="regression", method="lora", **SMALL)
    assert tuned.fit is not None
    assert tuned.fit.history == adapted.fit.history


def test_equal_seeds_give_equal_results(adapted, lm, proteins, shares):
    again = fine_tune(lm, proteins, shares, task="regression", method="lora", **SMALL)
    assert again.fit is not None
    np.testing.assert_array_equal(again.fit.outputs, adapted.fit.outputs)
    assert again.fit.history == adapted.fit.history
    other = fine_tune(lm, proteins, shares, task="regression", seed=1)
    assert other.fit is not None
    assert (other.fit.parts != adapted.fit.parts).any()


def test_without_a_rate_nothing_moves(lm, proteins, shares):
    options = SMALL | {"max_epochs": 1, "learning_rate": 0.0}
    tuned = fine_tune(lm, proteins, shares, task="regression", method="lora", **options)
    for now, then in zip(leaves(tuned.model), leaves(lm), strict=True):
        np.testing.assert_array_equal(now, then)


def test_what_is_saved_is_loaded(moved, whole, proteins, tmp_path):
    for tuned, name in ((moved, "lora"), (whole, "full")):
        tuned.save(tmp_path / name)
        found = FineTuned.load(tmp_path / name, model=make())
        np.testing.assert_array_equal(found.outputs(proteins[:5]), tuned.outputs(proteins[:5]))
        for one, other in zip(leaves(found.model), leaves(tuned.model), strict=True):
            np.testing.assert_array_equal(one, other)
        assert found.classes == tuned.classes
    assert not (tmp_path / "lora" / "model.npz").exists()
    with pytest.raises(RunError, match="another model than that of its run"):
        FineTuned.load(tmp_path / "lora", model=make(random_seed=1))
    with pytest.raises(RunError, match="fits another model"):
        FineTuned.load(tmp_path / "full", model=make(mlp_dim=16))
    with pytest.raises(RunError, match="which run it came from"):
        FineTuned.load(tmp_path / "lora")
    with pytest.raises(RunError, match="no finetuned.json"):
        FineTuned.load(tmp_path)


def test_a_merged_model_needs_no_adapters(adapted, moved, proteins, tmp_path):
    moved.save(tmp_path, whole=True)
    assert not (tmp_path / "adapters.npz").exists()
    found = FineTuned.load(tmp_path, model=make(random_seed=3))
    np.testing.assert_array_equal(found.outputs(proteins[:5]), moved.outputs(proteins[:5]))
    assert (moved.outputs(proteins[:5]) != adapted.outputs(proteins[:5])).all()


def test_the_tuned_model_shares_no_array_with_the_first(lm, adapted):
    first, second = (
        {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
        for state in (
            (model.state.parameters, model.state.variables) for model in (lm, adapted.model)
        )
    )
    # Training donates its arrays: a shared one would be gone from the other model.
    assert not first & second


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        ([1.0] * 120, "regression", "all 86 training labels are 1"),
        (["a"] * 120, "classification", "all 86 training proteins are of the class 'a'"),
        ([str(n) for n in range(120)], "classification", "its own class"),
        ([*range(119), "high"], "regression", "label 120: the label 'high' is not a finite number"),
        ([*range(119), "nan"], "regression", "not a finite number"),
        ([None, *["a", "b"] * 59, "a"], "classification", "label 1 is missing"),
        ([*["a", "b"] * 59, "a", math.nan], "classification", "label 120 is missing"),
        ([*["a", "b"] * 59, "", "a"], "classification", "label 119 is missing"),
    ],
)
def test_labels_that_teach_nothing_are_told(lm, proteins, labels, task, message):
    with pytest.raises(RunError, match=message):
        fine_tune(lm, proteins, labels, task=task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, "task must be one of"),
        ({"method": "prompt"}, "method must be one of"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": math.nan}, "rank must be a whole number"),
        ({"max_epochs": 1.5}, "max_epochs must be a whole number"),
        ({"test_share": 1.0}, "test_share must be a number between"),
        ({"valid_share": math.nan}, "valid_share must be a number between"),
        ({"learning_rate": -1.0}, "learning_rate must be a number from 0"),
        ({"learning_rate": math.inf}, "learning_rate must be a number from 0"),
        ({"weight_decay": -1.0}, "weight_decay must be a number from 0"),
        ({"max_length": 1.5}, "max_length must be a whole number"),
        ({"alpha": 0}, "alpha must be a number above 0"),
        ({"alpha": math.nan}, "alpha must be a number above 0"),
        ({"seed": 2**40}, "seed must be a whole number"),
        ({"balanced": "yes"}, "balanced must be True or False"),
        ({"parts": ["train"] * 119}, "parts must have an entry for each of 120 proteins; got 119"),
        ({"parts": ["training"] * 120}, "parts must be train, valid, test; got 'training'"),
        ({"groups": ["a"] * 119}, "groups must have an entry for each of 120 proteins"),
    ],
)
def test_options_are_checked(lm, proteins, shares, options: dict[str, Any], message):
    options = {"task": "regression"} | options
    with pytest.raises(ValueError, match=message):
        fine_tune(lm, proteins, shares, **options)
