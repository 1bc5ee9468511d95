"""Models that were trained in Python are written to folders, and read back without running code."""

import jax
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import FixedLengthDiscreteDomain, make_protein_domain
from fast_attention.protein_lm.data.vocabulary import Vocabulary
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = {
    "num_layers": 1,
    "num_heads": 1,
    "qkv_dim": 8,
    "emb_dim": 8,
    "mlp_dim": 8,
    "batch_size": 2,
    "dropout_rate": 0.1,
}
ROWS = np.array([[1, 2, 3, 0], [3, 0, 1, 1]])


def make(**options):
    domain = FixedLengthDiscreteDomain(vocab_size=4, length=4)
    return FlaxLM(domain, **(SIZES | {"random_seed": 3} | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_len": 6, "with_mask": True},
        {"sampling_kwargs": {"temperature": 0.5, "max_length": 3}},
        {"attention_fn": make_fast_softmax_attention(nb_features=8)},
        {"ema_decay": 0.5},
    ],
    ids=["plain", "tokens", "sampling", "features", "average"],
)
def test_what_was_saved_is_the_same_model(tmp_path, options):
    model = make(**options)
    model.fit(ROWS)
    model.save(tmp_path / "new" / "model")
    found = FlaxLM.load(tmp_path / "new" / "model")
    np.testing.assert_array_equal(found.logits(ROWS), model.logits(ROWS))
    assert (found.tokens, found.config) == (model.tokens, model.config)
    assert found.sampling_kwargs == model.sampling_kwargs
    key = jax.random.key(0)
    np.testing.assert_array_equal(found.sample(3, key), model.sample(3, key))


def test_domains_of_every_kind_are_read_back(tmp_path):
    vocab = Vocabulary(300, include_bos=True, include_eos=True, include_pad=True)
    model = FlaxLM(FixedLengthDiscreteDomain(vocab=vocab, length=4), **SIZES)
    model.save(tmp_path / "large")
    assert FlaxLM.load(tmp_path / "large").domain.vocab.tokens == vocab.tokens
    bert = FlaxBERT(make_protein_domain(length=6), **SIZES)
    bert.save(tmp_path / "bert")
    expected, found = bert.embed(["MKTA"]), FlaxBERT.load(tmp_path / "bert").embed(["MKTA"])
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(RunError, match="FlaxBERT.load"):
        FlaxLM.load(tmp_path / "bert")


def test_a_saved_model_is_replaced_and_a_run_is_not(tmp_path):
    for seed in (1, 2):
        model = make(random_seed=seed)
        model.save(tmp_path / "model")
    np.testing.assert_array_equal(FlaxLM.load(tmp_path / "model").logits(ROWS), model.logits(ROWS))
    make().save_checkpoint(tmp_path / "training")
    with pytest.raises(RunError, match="holds a run"):
        make().save(tmp_path / "training")
    with pytest.raises(RunError, match="holds a run or an exported model"):
        make().save_checkpoint(tmp_path / "model")


def test_an_attention_function_of_ones_own_is_given_again(tmp_path):
    def own(query, key, value, **kwargs):
        return value

    model = make(attention_fn=own)
    model.save(tmp_path / "model")
    with pytest.raises(RunError, match="attention"):
        FlaxLM.load(tmp_path / "model")
    found = FlaxLM.load(tmp_path / "model", model=make(attention_fn=own, random_seed=9))
    np.testing.assert_array_equal(found.logits(ROWS), model.logits(ROWS))


# --- Checkpoints --------------------------------------------------------------------------------


def test_training_goes_on_from_a_checkpoint_as_without_it(tmp_path):
    model = make()
    model.fit_batch(ROWS)
    model.save_checkpoint(tmp_path / "checkpoint")
    expected = [model.fit_batch(ROWS)["loss"] for _ in range(3)]
    other = make(random_seed=5)
    other.load_checkpoint(tmp_path / "checkpoint")
    assert int(other.state.step) == 1
    # Rows and dropout follow from the seed and the step of the state.
    np.testing.assert_array_equal([other.fit_batch(ROWS)["loss"] for _ in range(3)], expected)
    read = FlaxLM.load(tmp_path / "checkpoint")
    again = make()
    again.load_checkpoint(tmp_path / "checkpoint")
    np.testing.assert_array_equal(read.logits(ROWS), again.logits(ROWS))


def test_the_newest_checkpoint_of_a_folder_counts(tmp_path):
    model = make()
    model.save_checkpoint(tmp_path)
    start = model.get_weights()
    model.fit_batch(ROWS)
    model.save_checkpoint(tmp_path)
    expected = model.logits(ROWS)
    model.set_weights(start)
    with pytest.raises(RunError, match="step 1, which is later than step 0"):
        model.save_checkpoint(tmp_path)
    model.load_checkpoint(tmp_path)
    np.testing.assert_array_equal(model.logits(ROWS), expected)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_the_checkpoint_of_a_step_is_replaced(tmp_path):
    model = make()
    model.save_checkpoint(tmp_path)
    other = make(random_seed=8)
    model.set_parameters(*(other.get_weights().parameters, other.get_weights().variables))
    model.save_checkpoint(tmp_path)
    found = make()
    found.load_checkpoint(tmp_path)
    np.testing.assert_array_equal(found.logits(ROWS), other.logits(ROWS))


def test_a_folder_without_checkpoint_leaves_the_model_as_it_was(tmp_path):
    model = make()
    expected = model.logits(ROWS)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        model.load_checkpoint(tmp_path / "not there")
    model.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="read it with FlaxLM.load"):
        model.load_checkpoint(tmp_path / "saved")
    np.testing.assert_array_equal(model.logits(ROWS), expected)
    assert not (tmp_path / "not there").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make().save_checkpoint(tmp_path)
    with pytest.raises(RunError):
        make(mlp_dim=16).load_checkpoint(tmp_path)
    with pytest.raises(RunError, match="holds another model"):
        make(mlp_dim=16).save_checkpoint(tmp_path)
