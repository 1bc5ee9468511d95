"""Files of vectors hold what `embed_sequences` gives, also when the work was stopped."""

import tracemalloc
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference import embedding, embedding_files
from fast_attention.protein_lm.inference.array_files import read_ids
from fast_attention.protein_lm.inference.embedding import EmbeddingConfig
from fast_attention.protein_lm.inference.embedding_files import embed_to_file
from fast_attention.protein_lm.models import FlaxLM

SIZES = {"emb_dim": 4, "num_heads": 1, "num_layers": 1, "qkv_dim": 4, "mlp_dim": 4}
RANDOM = np.random.default_rng(0)
IDS = ["sp|P1|A", "a/b", "..", "100%", "a", "p5", "p6", "p7"]
PROTEINS = [
    FastaRecord(name, "", "".join(RANDOM.choice(list("ACDEFGHIKL"), n)))
    for name, n in zip(IDS, (7, 1, 20, 3, 13, 8, 2, 11), strict=True)
]
SEQUENCES = [record.sequence for record in PROTEINS]
SEVERAL = (0, "last")


@pytest.fixture(scope="module")
def model():
    return FlaxLM(make_protein_domain(length=12), positions="none", **SIZES)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    """Windows of one batch, so that there are several."""
    monkeypatch.setattr(embedding, "window_batches", lambda *_: 1)


def options(**others: Any) -> dict[str, Any]:
    return {"tokens_per_batch": 24, **others}


def embed(model, path, records=PROTEINS, **others: Any):
    return embed_to_file(model, records, path, EmbeddingConfig(**options(**others)))


@pytest.mark.parametrize("layers", ["last", SEVERAL])
@pytest.mark.parametrize("pool", ["mean", None])
def test_npz(model, tmp_path, layers, pool):
    done = embed(model, tmp_path / "v.npz", layers=layers, pool=pool)
    assert done == (len(PROTEINS), sum(map(len, SEQUENCES)), 2, sum(map(len, SEQUENCES)))
    expected = model.embed(SEQUENCES, **options(layers=layers, pool=pool))
    with np.load(tmp_path / "v.npz") as file:
        assert file["ids"].tolist() == IDS
        assert file["layers"].tolist() == (["last"] if layers == "last" else ["0", "last"])
        if pool:
            np.testing.assert_array_equal(file["embeddings"], expected)
        else:
            for number, vectors in enumerate(expected):
                np.testing.assert_array_equal(file[str(number)], vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npz"]


@pytest.mark.parametrize("layers", ["last", SEVERAL])
@pytest.mark.parametrize("pool", ["mean", None])
def test_hdf5(model, tmp_path, layers, pool):
    embed(model, tmp_path / "v.h5", layers=layers, pool=pool, dtype="float16")
    expected = model.embed(SEQUENCES, **options(layers=layers, pool=pool, dtype="float16"))
    with h5py.File(tmp_path / "v.h5") as file:
        assert file["ids"].asstr()[:].tolist() == IDS
        assert list(file.attrs["layers"]) == (["last"] if layers == "last" else ["0", "last"])
        if pool:
            assert file["embeddings"].dtype == np.float16
            np.testing.assert_array_equal(file["embeddings"], expected)
        else:
            names = ["sp|P1|A", "a%2Fb", "%2E%2E", "100%25", "a", "p5", "p6", "p7"]
            for name, vectors in zip(names, expected, strict=True):
                np.testing.assert_array_equal(file["embeddings"][name], vectors)


@pytest.mark.parametrize("layers", ["last", SEVERAL])
@pytest.mark.parametrize("pool", ["mean", None])
def test_parquet(model, tmp_path, layers, pool):
    embed(model, tmp_path / "v.parquet", layers=layers, pool=pool, dtype="float16")
    expected = model.embed(SEQUENCES, **options(layers=list(SEVERAL), pool=pool, dtype="float16"))
    table = pq.read_table(tmp_path / "v.parquet")
    names = ["embedding"] if layers == "last" else ["embedding_0", "embedding_last"]
    counts = [1 if pool else len(sequence) for sequence in SEQUENCES]
    assert table["id"].to_pylist() == np.repeat(IDS, counts).tolist()
    if not pool:
        assert table["position"].to_pylist() == [t for n in counts for t in range(1, n + 1)]
    assert table.column_names == ["id", *([] if pool else ["position"]), *names]
    rows = [vectors.reshape(2, -1, 4) for vectors in expected]
    for name, vectors in zip(names[::-1], np.concatenate(rows, axis=1)[::-1], strict=False):
        np.testing.assert_array_equal(np.stack(table[name].to_pylist()), vectors)


class Stopped(RuntimeError):
    pass


@pytest.mark.parametrize("name", ["v.npz", "v.parquet"])
@pytest.mark.parametrize("pool", ["mean", None])
def test_stopped_work_goes_on(model, tmp_path, monkeypatch, name, pool):
    whole, path = tmp_path / f"whole_{name}", tmp_path / name
    embed(model, whole, pool=pool)
    compute, computed = embedding.embed_window, []

    def count(model, window, *others):
        if len(computed) == 2:
            raise Stopped
        computed.append(len(window))
        return compute(model, window, *others)

    monkeypatch.setattr(embedding, "embed_window", count)
    with pytest.raises(Stopped):
        embed(model, path, pool=pool)
    assert not path.exists()
    partial = tmp_path / f"{name}.partial"
    assert len(list(partial.glob("*.npz"))) == 2
    first, computed[:] = sum(computed), []

    monkeypatch.setattr(
        embedding, "embed_window", lambda *a: computed.append(len(a[1])) or compute(*a)
    )
    done = embed(model, path, pool=pool)
    assert sum(computed) == len(PROTEINS) - first
    assert done.computed == sum(map(len, SEQUENCES[first:])) < done.residues
    assert path.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_work_stopped_while_the_file_is_written_goes_on(model, tmp_path, monkeypatch):
    path = tmp_path / "v.npz"
    with monkeypatch.context() as patch:
        patch.setattr(embedding_files, "write_arrays", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            embed(model, path)
    done = embed(model, path)
    assert done.computed == 0 and done.residues > 0
    with np.load(path) as file:
        np.testing.assert_array_equal(file["embeddings"], model.embed(SEQUENCES, **options()))


def stop(model, path):
    """Leaves the work of the first windows."""

    def records():
        yield from PROTEINS[:5]
        raise Stopped

    with pytest.raises(Stopped):
        embed(model, path, records())


@pytest.mark.parametrize("damage", [lambda x: b"", lambda x: x[:-100], lambda x: x[:500]])
def test_an_empty_or_truncated_part_is_computed_again(model, tmp_path, damage):
    whole, path = tmp_path / "whole.npz", tmp_path / "v.npz"
    embed(model, whole)
    stop(model, path)
    for part in (tmp_path / "v.npz.partial").glob("*.npz"):
        part.write_bytes(damage(part.read_bytes()))
    assert embed(model, path).computed == sum(map(len, SEQUENCES))
    assert path.read_bytes() == whole.read_bytes()


def test_work_that_failed_before_it_began_does_not_block_other_settings(model, tmp_path):
    def records():
        raise FileNotFoundError("typo.fasta")
        yield

    with pytest.raises(FileNotFoundError):
        embed(model, tmp_path / "v.npz", records(), layers=0)
    assert not list(tmp_path.iterdir())
    assert embed(model, tmp_path / "v.npz").proteins == len(PROTEINS)


LONG_ID = "i" * 900_000
MANY = [FastaRecord(LONG_ID, "", "MKT"), *(FastaRecord(str(i), "", "MK") for i in range(300))]


@pytest.mark.parametrize(
    ("name", "pool"), [("v.npz", "mean"), ("v.npz", None), ("v.parquet", None), ("v.h5", "mean")]
)
def test_one_very_long_id_does_not_widen_the_others(model, tmp_path, monkeypatch, name, pool):
    monkeypatch.setattr(embedding, "window_batches", lambda *_: 64)
    tracemalloc.start()
    embed(model, tmp_path / name, MANY, pool=pool, tokens_per_batch=8192)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # An array of the width of the longest id would take 1,080 MB.
    assert peak < 50_000_000
    expected = [record.id for record in MANY]
    if name.endswith(".npz"):
        assert read_ids(tmp_path / name) == expected
    elif name.endswith(".h5"):
        with h5py.File(tmp_path / name) as file:
            assert file["ids"].asstr()[:].tolist() == expected
    else:
        ids = pq.read_table(tmp_path / name, columns=["id"])["id"].to_pylist()
        assert list(dict.fromkeys(ids)) == expected and len(ids) == 603


def test_an_id_too_long_for_a_dataset_is_refused_before_the_work(model, tmp_path):
    with pytest.raises(ValueError, match=r"begins with 'iiii.*900,000 letters.*\.npz or \.parquet"):
        embed(model, tmp_path / "v.h5", MANY, pool=None)
    assert not list(tmp_path.iterdir())


def test_other_settings_are_refused(model, tmp_path):
    path = tmp_path / "v.npz"
    stop(model, path)
    with pytest.raises(RunError, match="pool: 'mean' there, 'max' asked for now"):
        embed(model, path, pool="max")
    other = FlaxLM(make_protein_domain(length=12), positions="none", random_seed=1, **SIZES)
    with pytest.raises(RunError, match="model: "):
        embed(other, path)
    config = EmbeddingConfig(**options())
    with pytest.raises(RunError, match="step: None there, 7 asked for now"):
        embed_to_file(model, PROTEINS, path, config, origin={"step": 7})
    assert embed(model, path).computed < sum(map(len, SEQUENCES))


def test_changed_and_damaged_parts_are_computed_again(model, tmp_path):
    path = tmp_path / "v.npz"
    stop(model, path)
    (tmp_path / "v.npz.partial" / "000001.npz").write_bytes(b"PK")
    changed = [PROTEINS[0]._replace(sequence="WWWWWWW"), *PROTEINS[1:]]
    embed(model, path, changed)
    with np.load(path) as file:
        expected = model.embed([record.sequence for record in changed], **options())
        np.testing.assert_allclose(file["embeddings"], expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_done_is_told(model, tmp_path):
    with pytest.raises(ValueError, match=r"v.txt.*\.npz, \.h5"):
        embed(model, tmp_path / "v.txt")
    with pytest.raises(OSError, match="create it first"):
        embed(model, tmp_path / "absent" / "v.npz")
    with pytest.raises(ValueError, match="two proteins have the id 'a'"):
        embed(model, tmp_path / "v.npz", [FastaRecord("a", "", "MK")] * 2)
    with pytest.raises(RunError, match="no protein"):
        embed(model, tmp_path / "w.npz", [])
    (tmp_path / "u.npz.partial").mkdir()
    (tmp_path / "u.npz.partial" / "notes").touch()
    with pytest.raises(RunError, match="cannot be used.*notes"):
        embed(model, tmp_path / "u.npz")
