"""Python blocks of the pages run as they stand, on little data; for tutorials, see another file."""

import re
import shutil
from pathlib import Path

import jax
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention
from fast_attention.models import Transformer, TransformerConfig
from fast_attention.protein_lm import cli, make_protein_domain
from fast_attention.protein_lm.data.corpus import bundled_corpus, bundled_splits
from fast_attention.protein_lm.models import FlaxBERT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIALS = DOCS / "tutorials"
PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "MALWMRLLPLLALLALWGPDPAAA", "MGDVEKGKKIFIMKCSQCHTVEK"] * 4
SMALL = {"num_layers": 1, "emb_dim": 16, "num_heads": 2, "qkv_dim": 16, "mlp_dim": 16}


def blocks(page, *languages):
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [(name, text) for name, text in found if name in languages]


PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.parent != TUTORIALS and blocks(page, "python")
]


def given():
    """What pages speak of without making it: queries, a model, tokens, proteins."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 16, 2, 64))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 20)
    stored = make_fast_softmax_attention(
        nb_features=8, estimator="wderf_s", calibration="stored", unidirectional=True
    )
    config = TransformerConfig(vocab_size=29, causal=True, **SMALL)
    model = Transformer(config, stored, rngs=nnx.Rngs(0))
    return {
        "attention_fn": make_fast_softmax_attention(nb_features=8, unidirectional=True),
        "query": query,
        "key": key,
        "value": value,
        "mask": tokens >= 0,
        "domain": make_protein_domain(length=64),
        "my_attention": make_fast_softmax_attention(nb_features=64, chunk_size=32),
        "model": model,
        "tokens": tokens,
        "rngs": nnx.Rngs(0),
        "proteins": PROTEINS,
        "sequences": [protein[i:] for i, protein in enumerate(PROTEINS)],
        "labels": [float(i % 5) for i in range(len(PROTEINS))],
        "families": [str(i % 4) for i in range(len(PROTEINS))],
    }


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the pages read: runs, tables and FASTA files."""
    folder = tmp_path_factory.mktemp("docs")
    fasta = folder / "my_proteins.fasta"
    fasta.write_text("".join(f">p{i}\n{protein}\n" for i, protein in enumerate(PROTEINS)))
    (folder / "proteins").mkdir()
    shutil.copy(fasta, folder / "proteins" / "a.fasta")
    shutil.copy(bundled_splits(), folder / "splits.tsv.gz")
    shutil.copy(bundled_corpus("tiny"), folder / "test.fasta.gz")
    (folder / "tests").symlink_to(ROOT / "tests")
    demo = folder / "runs" / "demo"
    settings = [f"--gin_bindings=FlaxModel.{name} = {value}" for name, value in SMALL.items()]
    train = [
        "train",
        f"--work_dir={demo}",
        *(f"--{name}fasta={fasta}" for name in ("", "valid_", "test_")),
        *settings,
        "--gin_bindings=make_protein_domain.length = 64",
        "--gin_bindings=experiment.max_train_length = 64",
        "--gin_bindings=experiment.num_samples = 0",
        "--batch_size=2",
        "--steps=2",
    ]
    assert cli.main(train) == 0
    for name in ("exact", "mine"):
        shutil.copytree(demo, folder / "runs" / name)
    FlaxBERT(make_protein_domain(length=64), **SMALL).save(folder / "runs" / "bert")
    common = [f"--run_dir={demo}", f"--fasta={fasta}"]
    assert cli.main(["score", *common, f"--output={folder}/scores.tsv"]) == 0
    assert cli.main(["embed", *common, f"--output={folder}/vectors.npz"]) == 0
    return folder


@pytest.fixture
def copied(workplace, tmp_path, monkeypatch):
    shutil.copytree(workplace, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_of_a_page_runs(page, copied):
    if page.name == "output.md":
        pytest.importorskip("pandas")
    if page.name == "multi-device.md":
        pytest.skip("needs eight devices")
    namespace = given()
    # As users have it.
    with jax.numpy_rank_promotion("allow"):
        for _, block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), namespace)
