"""The embedder, the reducers, the baseline and the batches of Google's protein_lm, by its rules."""

import functools
import json

import gin
import jax
import numpy as np
import pytest

from fast_attention.protein_lm import (
    EmpiricalBaseline,
    FixedLengthDiscreteDomain,
    FlaxBERT,
    FlaxLM,
    ProteinLMEmbedder,
    batch_ds,
    combine_metrics,
    get_embed_fn,
    get_train_valid_files,
    gin_registry,
    make_protein_domain,
    masked_reduce_fn,
    max_reducer,
    mean_reducer,
    sum_reducer,
)
from fast_attention.protein_lm.cli import main
from fast_attention.protein_lm.data.fasta import FastaError, FastaRecord, write_fasta
from fast_attention.protein_lm.data.vocabulary import Vocabulary

SIZES = {"num_layers": 2, "num_heads": 1, "qkv_dim": 8, "emb_dim": 8, "mlp_dim": 8}
DOMAIN = make_protein_domain(length=12)
VOCAB = DOMAIN.vocab
PROTEINS = ["ACDEFHIKLNQP", "ALNQP"]


@pytest.fixture(scope="module")
def lm():
    return FlaxLM(DOMAIN, **SIZES)


@pytest.fixture(scope="module")
def bert():
    return FlaxBERT(DOMAIN, **SIZES)


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        (sum_reducer, [[5, 7, 9]]),
        (mean_reducer, [[2.5, 3.5, 4.5]]),
        (max_reducer, [[4, 5, 6]]),
    ],
)
def test_reducers_look_where_the_mask_is_one(reducer, expected):
    vectors = np.array([[[1, 2, 6], [4, 5, 3], [7, 10, 9]]])
    np.testing.assert_allclose(reducer(vectors, np.array([[1, 1, 0]])), expected)
    bad = vectors.astype(float)
    bad[0, 2] = np.nan
    np.testing.assert_allclose(reducer(bad, np.array([[1, 1, 0]])), expected)


@pytest.mark.parametrize("kept", [None, "eos", "bos", "pad", "mask"])
def test_special_tokens_are_left_out_by_their_names(kept):
    vectors = np.array([[[1.0, 2], [13, 14], [5, 6], [17, 18], [91, 20]]])
    inputs = np.array([[0, VOCAB.bos, VOCAB.eos, VOCAB.pad, VOCAB.mask]])
    options = {f"ignore_{name}": name != kept for name in ("eos", "bos", "pad", "mask")}
    order = {"eos": 2, "bos": 1, "pad": 3, "mask": 4}
    places = [0] if kept is None else [0, order[kept]]
    found = masked_reduce_fn(vectors, inputs, **options)
    np.testing.assert_allclose(found, vectors[:, places].mean(axis=1))
    default = masked_reduce_fn(vectors, inputs)
    np.testing.assert_allclose(default, vectors[:, [0, 2]].mean(axis=1))


def test_vector_t_of_a_causal_model_is_read_before_token_t(lm):
    """As the original shifts its inputs: the first vector is that of the begin token."""
    found = get_embed_fn(model=lm)(PROTEINS)
    assert found.shape == (2, 12, 8)
    read = lm.embed(PROTEINS, pool=None)
    np.testing.assert_allclose(found[0, 1:], read[0][:-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1, 1:6], read[1], rtol=1e-4, atol=1e-5)
    begin = lm.embed(PROTEINS, pool="bos")
    np.testing.assert_allclose(found[:, 0], begin, rtol=1e-4, atol=1e-5)
    # BOS, five residues and the end are read, and then padding.
    assert found[1, 6].any() and not found[1, 7:].any()


def test_a_masked_model_is_not_shifted(bert):
    found = get_embed_fn(model=bert)(["ALNQPA", "ALNQP"])
    np.testing.assert_allclose(
        found[1, :5], bert.embed(["ALNQP"], pool=None)[0], rtol=1e-4, atol=1e-5
    )


def test_heads_are_layers_and_logits(lm):
    ids = lm.domain.encode(PROTEINS)
    layers = {"input_emb": 0, "layer_0": 1, "layer_1": 2}
    own = lm.embed(PROTEINS[:1], layers=(0, 1, 2), pool=None)[0]
    for head, layer in layers.items():
        found = get_embed_fn(model=lm, output_head=head)(ids)
        np.testing.assert_allclose(found[0, 1:], own[layer][:-1], rtol=1e-4, atol=1e-5)
    logits = get_embed_fn(model=lm, output_head="logits")(ids[:1])
    np.testing.assert_allclose(logits, lm.logits(PROTEINS[:1]), rtol=1e-4, atol=1e-4)


def test_batches_have_one_size_and_change_nothing(lm):
    calls = []

    def reduce_fn(vectors, inputs):
        calls.append(inputs.shape)
        return masked_reduce_fn(vectors, inputs)

    embedder = ProteinLMEmbedder(model=lm, reduce_fn=reduce_fn, batch_size=4)
    ids = DOMAIN.sample_uniformly(5, seed=0)
    found = embedder(ids)
    assert calls == [(4, 12), (4, 12)]
    expected = get_embed_fn(model=lm, reduce_fn=masked_reduce_fn)(ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert embedder(PROTEINS).shape == (2, 8)


@pytest.mark.parametrize(("length", "width"), [(None, 12), (3, 3), (40, 12)])
def test_strings_are_cropped(lm, length, width):
    assert ProteinLMEmbedder(model=lm, length=length)(PROTEINS).shape == (2, width, 8)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (np.ones((1, 14)), "not in the domain"),
        (np.array([[99]]), "not in the domain"),
        ([], "no sequence"),
        ("MKT", r"give \[sequence\]"),
    ],
    ids=["long", "id", "none", "string"],
)
def test_what_cannot_be_embedded_is_told(lm, sequences, message):
    for ask in (ProteinLMEmbedder(model=lm), get_embed_fn(model=lm)):
        with pytest.raises(ValueError, match=message):
            ask(sequences)


def test_one_model_with_one_of_its_outputs_is_needed(lm, tmp_path):
    with pytest.raises(ValueError, match="exactly one of model and checkpoint_dir"):
        get_embed_fn()
    with pytest.raises(ValueError, match="fine-tune"):
        get_embed_fn(model=lm, output_head="regression")
    with pytest.raises(ValueError, match="layer_1"):
        get_embed_fn(model=lm, output_head="layer_2")
    with pytest.raises(ValueError, match="other tokens"):
        get_embed_fn(model=lm, domain=make_protein_domain(include_mask=False, length=12))
    lm.save(tmp_path)
    read = ProteinLMEmbedder(checkpoint_dir=tmp_path)(PROTEINS)
    np.testing.assert_array_equal(read, ProteinLMEmbedder(model=lm)(PROTEINS))


# --- EmpiricalBaseline ----------------------------------------------------------------------------


def test_the_empirical_distribution_is_that_of_the_tokens():
    domain = FixedLengthDiscreteDomain(vocab=Vocabulary(3, include_bos=True), length=2)
    rows = np.array([[0, 1], [1, 0]])
    for train in (rows, [rows], [(row,) for row in rows]):
        found = EmpiricalBaseline(domain, train, alpha=0).distribution
        np.testing.assert_array_equal(found, [0.5, 0.5, 0])
    np.testing.assert_allclose(
        EmpiricalBaseline(domain, rows).distribution, np.array([3, 3, 1]) / 7
    )


def test_two_tokens_each_half_of_the_time_have_perplexity_two():
    domain = FixedLengthDiscreteDomain(vocab=Vocabulary(2, include_bos=True), length=1)
    rows = np.array([[0, 1], [1, 0]])
    baseline = EmpiricalBaseline(domain, rows)
    found = baseline.evaluate(rows)
    assert found["perplexity"] == pytest.approx(2, rel=1e-6)
    assert (found["accuracy"], found["denominator"]) == (0.5, 4)
    sums = [baseline.evaluate_batch(row) for row in rows]
    assert sums[0]["loss"].shape == (1,)
    assert combine_metrics(sums) == pytest.approx(found)
    assert baseline.evaluate(rows, steps=1)["denominator"] == 2


def test_special_tokens_are_neither_counted_nor_scored():
    with pytest.raises(TypeError, match="one string: give"):
        EmpiricalBaseline(DOMAIN, "AAC")
    baseline = EmpiricalBaseline(DOMAIN, ["AAC"], alpha=0)
    padded = np.array([[VOCAB.bos, 0, 0, 1, VOCAB.eos, VOCAB.pad]])
    again = EmpiricalBaseline(DOMAIN, [padded], alpha=0)
    np.testing.assert_array_equal(again.distribution, baseline.distribution)
    assert again.evaluate_batch(padded)["denominator"] == 3
    assert np.isinf(again.evaluate_batch("W")["loss"])
    with pytest.raises(ValueError, match="expected ids from 0 to 28"):
        baseline.evaluate_batch([29])
    with pytest.raises(ValueError, match="alpha"):
        EmpiricalBaseline(DOMAIN, ["A"], alpha=-1)


# --- A folder of data, and settings ---------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("c", "a", "d", "b", "tmp_e"):
        sequences = ["".join(rng.choice(list("ACDEFGHIKL"), 20)) for _ in range(6)]
        records = [FastaRecord(f"{name}{i}", "", text) for i, text in enumerate(sequences)]
        write_fasta(folder / f"{name}.fasta", records)
    return folder


def test_files_are_divided_by_their_names(shards):
    train, valid = get_train_valid_files(shards, num_test_files=1, num_valid_files=1)
    assert [path[-7:] for path in train + valid] == ["c.fasta", "d.fasta", "b.fasta"]
    with pytest.raises(ValueError, match="has 4 FASTA files.*num_test_files = 10"):
        get_train_valid_files(shards)
    with pytest.raises(FastaError):
        get_train_valid_files(shards / "none")


def test_batches_are_cropped_and_packed(shards):
    plain = list(batch_ds(str(shards / "a.fasta"), length=8, batch_size=3, shuffle_buffer=None))
    assert [batch["targets"].shape for batch in plain] == [(3, 8), (3, 8)]
    packed = list(batch_ds(str(shards / "a.fasta"), length=8, batch_size=1, pack_length=24))
    assert {batch["targets"].shape for batch in packed} == {(1, 24)}
    total = sum(int((batch["weights"] > 0).sum()) for batch in packed)
    assert total == sum(int((batch["weights"] > 0).sum()) for batch in plain) == 6 * 8
    rows = [[1, 2, 3], [4, 5]]
    (batch,) = batch_ds(rows, length=4, batch_size=2, shuffle_buffer=0, domain=DOMAIN)
    np.testing.assert_array_equal(
        batch["targets"], [[1, 2, 3, VOCAB.eos], [4, 5, VOCAB.eos, VOCAB.pad]]
    )


ORIGINAL = """
experiment.data_dir = {folder!r}
experiment.xid = 7
experiment.save_checkpoints = False
experiment.restore_checkpoint = False
experiment.checkpoint_frequency = None
experiment.batch_size_per_device = 2
experiment.max_train_steps = 2
experiment.max_train_length = 16
experiment.eval_frequency = 2
experiment.model_cls = @FlaxLM
get_train_valid_files.num_test_files = 0
get_train_valid_files.num_valid_files = 1
batch_ds.pack_length = 32
make_protein_domain.length = 24
FlaxModel.num_layers = 1
FlaxModel.num_heads = 1
FlaxModel.emb_dim = 8
FlaxModel.qkv_dim = 8
FlaxModel.mlp_dim = 8
FlaxModel.batch_size = 4
FlaxModel.pmap = True
FlaxModel.cache = True
FlaxModel.store_metrics = False
FlaxModel.with_bos = True
FlaxModel.sampling_kwargs = {{'temperature': 0.5}}
"""


def test_settings_written_for_the_original_train(shards, tmp_path, capsys):
    (tmp_path / "original.gin").write_text(ORIGINAL.format(folder=str(shards)))
    arguments = ["train", f"--gin_file={tmp_path / 'original.gin'}", f"--work_dir={tmp_path}"]
    assert main(arguments) == 0
    folder = tmp_path / "7_l16"
    assert json.loads((folder / "result.json").read_text())["steps"] == 2
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
    assert "is not used" not in capsys.readouterr().err
    assert FlaxLM.load(folder).sampling_kwargs == {"temperature": 0.5}
    assert main(arguments) == 1
    assert "restore_checkpoint = False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("experiment.train_files = 'a.fasta'", "give one of them"),
        ("experiment.pack_sequences = False", "batch_ds.pack_length"),
        ("get_train_valid_files.num_test_files = 9", "none is left to train on"),
        ("FlaxModel.cache = False", "decoding states exist only"),
        ("FlaxModel.store_metrics = True", "metrics.jsonl"),
        ("FlaxModel.output_head = 'regression'", "fine-tune"),
        ("FlaxModel.positional_encoding_module = None", "positions="),
    ],
)
def test_settings_that_cannot_be_met_say_what_to_do(shards, tmp_path, capsys, binding, message):
    (tmp_path / "original.gin").write_text(ORIGINAL.format(folder=str(shards)))
    arguments = ["train", f"--gin_file={tmp_path / 'original.gin'}", f"--work_dir={tmp_path}"]
    assert main([*arguments, f"--gin_bindings={binding}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "7_l16").exists()


def test_vocabularies_and_domains_are_settings():
    gin_registry.configure(
        bindings=[
            "FlaxModel.domain = @VariableLengthDiscreteDomain()",
            "VariableLengthDiscreteDomain.vocab = @ProteinVocab()",
            "VariableLengthDiscreteDomain.length = 6",
            "VariableLengthDiscreteDomain.min_length = 1",
            "ProteinVocab.include_align_tokens = True",
            "ProteinVocab.include_eos = True",
            *(f"FlaxModel.{name} = {value}" for name, value in SIZES.items()),
        ]
    )
    model = FlaxLM()
    assert model.domain.vocab.tokens[-3:] == (".", "-", ">")
    assert (model.bos_token, model.length) == (23, 6)
    gin.clear_config()
    gin_registry.configure(
        bindings=[
            "FlaxModel.domain = @FixedLengthDiscreteDomain()",
            "FixedLengthDiscreteDomain.vocab = @Vocabulary()",
            "FixedLengthDiscreteDomain.length = 3",
            "Vocabulary.tokens = ['a', 'b']",
            "masked_reduce_fn.reducer_fn = @sum_reducer",
            "ProteinLMEmbedder.reduce_fn = @masked_reduce_fn",
            "ProteinLMEmbedder.batch_size = 2",
            *(f"FlaxModel.{name} = {value}" for name, value in SIZES.items()),
        ]
    )
    model = FlaxLM()
    assert model.vocab_size == 3
    embedder = gin.get_configurable("ProteinLMEmbedder")(model=model)
    domain = FixedLengthDiscreteDomain(vocab=Vocabulary("ab"), length=3)
    vectors = get_embed_fn(model=model)([[0, 1, 0]])
    expected = functools.partial(masked_reduce_fn, reducer_fn=sum_reducer, domain=domain)(
        vectors, np.array([[0, 1, 0]])
    )
    np.testing.assert_allclose(embedder([[0, 1, 0]]), expected, rtol=1e-5)
    assert jax.tree.leaves(model.weights)
