"""Published models as folders that the commands read: numbers are those of the original."""

import shutil
from pathlib import Path

import gin
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.models import load_pretrained
from fast_attention.protein_lm import cli, gin_registry
from fast_attention.protein_lm.data.packing import PackedRows
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference.mutation_effects import score_variants
from fast_attention.protein_lm.inference.mutations import parse_variant
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.modeling.objectives import Masked
from fast_attention.protein_lm.runs.importing import alphabet_of, import_model

DATA = Path(__file__).parents[2] / "data" / "pretrained"
KINDS = ["esm2_tiny", "bert_tiny"]
PROTEIN = "MKTAYIAKQR"


@pytest.fixture(scope="module", params=KINDS)
def imported(request, tmp_path_factory):
    """A folder, the model that is read from it, and the model as published."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_model(DATA / request.param, folder)
    return folder, load_run(folder)[0], load_pretrained(DATA / request.param).model


def rows(model, *sequences):
    """Rows as the original reads them."""
    vocab = model.domain.vocab
    return np.array([[vocab.bos, *vocab.encode(x), vocab.eos] for x in sequences])


def log_probabilities(model, published, sequence, hidden=()):
    """float64 ``[n, V]`` of the residues, some of them hidden."""
    ids = rows(model, sequence)
    for place in hidden:
        ids[0, place + 1] = model.domain.vocab.mask
    logits = np.asarray(published(jnp.asarray(ids)), np.float64)[0, 1:-1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_logits(imported):
    _, model, published = imported
    found = model.logits([PROTEIN])
    np.testing.assert_allclose(found, published(jnp.asarray(rows(model, PROTEIN))), atol=1e-5)


def test_scores(imported):
    _, model, published = imported
    ids = model.domain.vocab.encode(PROTEIN)
    expected = [
        log_probabilities(model, published, PROTEIN, [place])[place, token]
        for place, token in enumerate(ids)
    ]
    (score,) = model.score([PROTEIN])
    np.testing.assert_allclose(score.pseudo_log_likelihood, np.sum(expected), rtol=1e-5)


def test_embeddings(imported):
    _, model, published = imported
    (state,) = published.hidden_states(jnp.asarray(rows(model, PROTEIN)), ["last"])
    (residues,) = model.embed([PROTEIN], pool=None)
    np.testing.assert_allclose(residues, state[0, 1:-1], atol=1e-5)
    for pool, expected in (("bos", state[0, 0]), ("eos", state[0, -1])):
        np.testing.assert_allclose(model.embed([PROTEIN], pool=pool)[0], expected, atol=1e-5)


def test_mutations(imported):
    _, model, published = imported
    ids = model.domain.vocab.ids
    variant = parse_variant("T3A", PROTEIN)
    for method, column, hidden in (
        ("masked-marginals", "masked_marginal", [2]),
        ("wt-marginals", "wt_marginal", []),
    ):
        table = log_probabilities(model, published, PROTEIN, hidden)[2]
        found = score_variants(model, PROTEIN, [variant], method=method)[column]
        np.testing.assert_allclose(found, table[ids["A"]] - table[ids["T"]], rtol=1e-4, atol=1e-5)


def test_training_goes_on(imported):
    folder = imported[0]
    model = load_run(folder)[0].with_attention(None, learning_rate=1e-3)
    before = model.evaluate([PROTEIN], seed=1)["loss"]
    for _ in range(10):
        model.fit_batch([PROTEIN] * 8)
    assert model.evaluate([PROTEIN], seed=1)["loss"] < before


def test_enclosed_rows_are_those_of_each_sequence():
    """Sequences packed in a row are corrupted and numbered as rows of their own."""
    alphabet = alphabet_of(["<cls>", "<pad>", "<eos>", "<mask>", *"ACDEFGHIKL"], 14)
    sequences = [np.array([4, 5, 6, 2]), np.array([7, 8, 2]), np.array([9, 10, 11, 12, 2])]
    width = sum(map(len, sequences)) + len(sequences) + 2
    tokens = np.full((1, width), alphabet.pad, np.int32)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    whole = np.concatenate(sequences)
    tokens[0, : len(whole)] = whole
    segment_ids[0, : len(whole)] = np.repeat([1, 2, 3], list(map(len, sequences)))
    positions[0, : len(whole)] = np.concatenate([np.arange(len(x)) for x in sequences])
    objective = Masked(mask_rate=0.0, enclose=True)
    draws = np.random.default_rng(0).random((2, 1, width))
    batch = objective.batch(PackedRows(tokens, segment_ids, positions), alphabet, draws)
    expected = np.concatenate([[alphabet.bos, *x] for x in sequences])
    np.testing.assert_array_equal(batch["targets"][0, : len(expected)], expected)
    assert (batch["targets"][0, len(expected) :] == alphabet.pad).all()
    lengths = [len(x) + 1 for x in sequences]
    np.testing.assert_array_equal(
        batch["segment_ids"][0], [*np.repeat([1, 2, 3], lengths), *[0] * (width - sum(lengths))]
    )
    np.testing.assert_array_equal(
        batch["positions"][0, : sum(lengths)], np.concatenate([np.arange(n) for n in lengths])
    )
    # One residue a sequence is chosen, and never a begin or an end token.
    chosen = batch["weights"][0] > 0
    assert sorted(batch["segment_ids"][0, chosen]) == [1, 2, 3]
    assert alphabet.are_ordinary(batch["targets"][0, chosen]).all()


def test_commands(imported, tmp_path):
    folder = imported[0]
    fasta = tmp_path / "x.fasta"
    fasta.write_text(f">a\n{PROTEIN}\n>b\nMKTAYG\n")
    for command in (
        ["evaluate"],
        ["score", f"--output={tmp_path / 'scores.csv'}"],
        ["embed", f"--output={tmp_path / 'vectors.npz'}"],
    ):
        assert cli.main([command[0], f"--run_dir={folder}", f"--fasta={fasta}", *command[1:]]) == 0
    assert (tmp_path / "scores.csv").read_text().count("\n") == 3
    filled = tmp_path / "filled.fasta"
    infill = ["sample", f"--run_dir={folder}", "--infill=MK[2]AY", "--num_samples=3"]
    assert cli.main([*infill, f"--output={filled}"]) == 0
    lines = [x for x in filled.read_text().splitlines() if not x.startswith(">")]
    assert len(lines) == 3
    assert all(len(x) == 6 and x[:2] == "MK" and x[-2:] == "AY" for x in lines)


def test_what_cannot_be_imported_is_named(tmp_path, capsys):
    source = shutil.copytree(DATA / "esm2_tiny", tmp_path / "esm")
    vocabulary = (source / "vocab.txt").read_text()
    for text, message in (
        (vocabulary.replace("<mask>", "<other>"), "expected one of <mask> and"),
        (vocabulary + "J\n", "34 tokens, and the model 33 embeddings"),
        (vocabulary.replace("L\n", "A\n"), "stands there more than once"),
        (vocabulary.replace("L\n", "\n"), "line 5 is empty"),
        ("\n".join(reversed(vocabulary.split())), "pad_token_id is 31 there and 1 here"),
    ):
        (source / "vocab.txt").write_text(text)
        with pytest.raises(RunError, match=message):
            import_model(source, tmp_path / "out")
    (source / "vocab.txt").unlink()
    command = ["import", f"--from={source}", f"--work_dir={tmp_path / 'out'}"]
    assert cli.main(command) == 1
    assert "vocab.txt" in capsys.readouterr().err
    (source / "vocab.txt").write_text(vocabulary)
    (source / "model.safetensors").write_bytes(b"0")
    assert cli.main(command) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert cli.main(["import", f"--from={tmp_path / 'no'}", command[2]]) == 1
    assert not (tmp_path / "out").exists()


def test_models_that_are_there_are_not_replaced(tmp_path):
    """Neither those of this package, nor those of others, the imported one among them."""
    sources = [shutil.copytree(DATA / kind, tmp_path / kind) for kind in KINDS]
    import_model(sources[0], tmp_path / "out")
    import_model(sources[0], tmp_path / "out")
    for folder in (tmp_path / "out", *sources):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(RunError, match="holds another model|is the published model"):
            import_model(sources[1], folder)
        with pytest.raises(RunError, match="another program|holds|folder of its own"):
            load_run(tmp_path / "out").model.save(sources[0])
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_gin_configuration_does_not_change_what_is_imported(tmp_path):
    gin_registry.configure(bindings=["FlaxModel.attention_fn = @make_fast_softmax_attention()"])
    import_model(DATA / "esm2_tiny", tmp_path / "run")
    gin.clear_config()
    assert load_run(tmp_path / "run").model.attention_fn is None
