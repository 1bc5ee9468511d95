"""Sequence to sequence, against an encoder and a decoder used by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fast_attention.models import (
    EncoderDecoder,
    PerformerEncoderDecoder,
    PerformerLM,
    ReformerEncoderDecoder,
)
from fast_attention.models.training import make_train_step
from tests.layers.definitions import compiled
from tests.models.cases import LM, M, V, build, tokens, with_sampling

B, S, T = 2, 6, 5
SOURCE = tokens(B, S)
# Row 1 ends after three tokens.
TARGET = np.where(np.arange(T)[None] < np.array([[5], [3]]), tokens(B, T, seed=1) % (V - 1) + 1, 0)
MASK = np.arange(S)[None] < np.array([[6], [4]])
SHAPE = {"num_tokens": V, "max_seq_len": 12, "depth": 1, "heads": 2, "dim_head": 4}
PAIRS = {
    "performer": (PerformerEncoderDecoder, {"reversible": False}, {"tie_token_embeds": True}),
    "reformer": (ReformerEncoderDecoder, {"use_full_attn": True, "ff_chunks": 1}, {}),
}


def pair(name, **more):
    preset, both, own = PAIRS[name]
    sides = {f"{side}_{k}": v for side in ("enc", "dec") for k, v in (SHAPE | both).items()}
    return build(preset, dim=M, **(sides | own | more))


@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_is_that_of_the_decoder_after_the_encoder_without_padding(name):
    model = pair(name)

    @compiled
    def run(source, target, mask):
        return model.loss(source, target, source_mask=mask), model(
            source, target[:, :-1], source_mask=mask
        )

    (loss, number), logits = run(SOURCE, TARGET, MASK)
    assert number == 6 and logits.shape == (B, T - 1, V) and logits.dtype == jnp.float32
    by_hand = []

    def apart(source, target):
        return model.decoder(target, context=model.encoder.encode(source))

    for row in range(B):
        source = SOURCE[row : row + 1, : MASK[row].sum()]
        target = TARGET[row : row + 1, : (TARGET[row] != 0).sum()]
        alone = compiled(apart)(source, target[:, :-1])[0]
        np.testing.assert_allclose(logits[row, : len(alone)], alone, atol=2e-5)
        log = jax.nn.log_softmax(alone)
        by_hand += [-log[t, token] for t, token in enumerate(target[0, 1:])]
    np.testing.assert_allclose(loss, np.mean(by_hand), rtol=1e-5)
    # Padding of the source may be anything, and so may what is not predicted.
    other = run(np.where(MASK, SOURCE, 3), TARGET, MASK)
    np.testing.assert_array_equal(other[1], logits)
    assert model.ignore_index == 0


def test_tied_embeddings_are_one_parameter_with_one_gradient():
    model = pair("performer")
    assert model.decoder.embed is model.encoder.embed
    loose = pair("performer", tie_token_embeds=False)
    count, more = (
        sum(x.size for x in jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (model, loose)
    )
    assert more - count == V * M
    wide = PerformerLM(rngs=nnx.Rngs(0), **(LM | {"depth": 1, "num_tokens": V + 1}))
    reader = PerformerLM(
        rngs=nnx.Rngs(0), **(LM | {"depth": 1, "causal": True, "cross_attend": True})
    )
    with pytest.raises(ValueError, match=r"cannot be tied, got \(\(8, 8\), \(7, 8\)\)"):
        EncoderDecoder(wide, reader, tie_embeddings=True)


@pytest.mark.parametrize("name", PAIRS)
def test_generation_continues_as_the_whole_would(name):
    model = pair(name)
    start = np.ones((B, 1), np.int32)
    options = with_sampling({"key": jax.random.key(0), "max_new_tokens": 4, "temperature": 0.0})
    found = np.asarray(model.generate(SOURCE, start, source_mask=MASK, **options))
    read = compiled(lambda target: model(SOURCE, target, source_mask=MASK))
    row = np.concatenate([start, np.zeros((B, 4), np.int32)], axis=1)
    for t in range(4):
        row[:, t + 1] = np.argmax(read(row)[:, t], axis=-1)
    np.testing.assert_array_equal(found, row[:, 1:])
    eos = int(found[0, 1])
    ended = np.asarray(model.generate(SOURCE, start, source_mask=MASK, eos_token=eos, **options))
    after = np.flatnonzero(ended[0] == eos)[0] + 1
    assert np.all(ended[0, after:] == model.pad_value)


@pytest.mark.parametrize("name", PAIRS)
def test_the_encoder_learns_and_is_differentiated_once(name, monkeypatch):
    # Cross attention makes two blocks of the Performer's layer; both Reformer's read the context.
    more = {"dec_reversible": True} if name == "performer" else {"dec_depth": 2}
    model = pair(name, **more)
    assert model.decoder.stack.config.reversible
    pulled = []

    @jax.custom_vjp
    def tap(x):
        return x

    def pull(_, gradient):
        pulled.append(gradient.shape)
        return (gradient,)

    tap.defvjp(lambda x: (x, None), pull)
    encode = EncoderDecoder.encode
    monkeypatch.setattr(
        EncoderDecoder, "encode", lambda self, *a, **options: tap(encode(self, *a, **options))
    )
    before = jax.tree.leaves(nnx.state(model.encoder, nnx.Param))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    def loss(model, batch, rngs):
        return model.loss(*batch[:2], source_mask=batch[2], rngs=rngs)

    step = make_train_step(loss)
    batch = tuple(map(jnp.asarray, (SOURCE, TARGET, MASK)))
    losses = [float(step(model, optimizer, batch, None)) for _ in range(6)]
    assert pulled == [(B, S, M)]
    assert losses[-1] < losses[0]
    after = jax.tree.leaves(nnx.state(model.encoder, nnx.Param))
    changed = [np.any(a != b) for a, b in zip(before, after, strict=True)]
    # All but the encoder's layer to the logits, of which it has no use.
    assert sum(changed) >= len(changed) - 2
