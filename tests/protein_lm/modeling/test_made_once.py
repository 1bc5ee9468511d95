import jax
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import FlaxBERT, FlaxLM, make_protein_domain
from fast_attention.protein_lm.modeling.made_once import made_once
from fast_attention.protein_lm.modeling.schedules import create_learning_rate_scheduler

STEPS = ("initialize", "train_step", "eval_step", "logits_step", "residue_step", "embedding_step")
SEQUENCES = ["MKTAYIAK", "GAVLI", "MKKLL"]


def make(kind=FlaxLM, nb_features=8, **options):
    sizes = {"emb_dim": 8, "num_heads": 1, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8}
    attention_fn = make_fast_softmax_attention(nb_features, unidirectional=kind is FlaxLM)
    schedule = create_learning_rate_scheduler("constant * linear_warmup", 0.1, 3)
    return kind(
        make_protein_domain(length=16),
        attention_fn=attention_fn,
        learning_rate=schedule,
        **(sizes | options),
    )


@pytest.mark.parametrize("kind", [FlaxLM, FlaxBERT])
def test_equal_models_share_their_programs(kind):
    first, second = make(kind), make(kind)
    for name in (*STEPS, "graphdef", "abstract_state"):
        assert getattr(first, name) is getattr(second, name)
    first.fit(SEQUENCES)
    compiled = first.train_step._cache_size()
    second.fit(SEQUENCES)
    assert second.train_step._cache_size() == compiled
    first, second = (
        np.concatenate([*map(np.ravel, jax.tree.leaves(m.weights))]) for m in (first, second)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "options", [{"mlp_dim": 16}, {"nb_features": 16}, {"weight_decay": 0.5}, {"ema_decay": 0.9}]
)
def test_models_that_differ_do_not_share_a_training_step(options):
    assert make(**options).train_step is not make().train_step


def test_what_cannot_be_hashed_is_made_each_time():
    made = []

    @made_once
    def make_one(value):
        made.append(value)
        return object()

    assert make_one(1) is make_one(1) and make_one([1]) is not make_one([1])
    assert made == [1, [1], [1]]


def test_an_error_of_the_maker_is_raised():
    @made_once
    def fail(value):
        raise TypeError("its own")

    with pytest.raises(TypeError, match="its own"):
        fail(1)
