"""Folders from anybody: whatever their files hold, reading gives a result or one line of error."""

import gc
import io
import os
import pickle
import random
import resource
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import FlaxLM, make_protein_domain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation import evaluation
from fast_attention.protein_lm.evaluation.evaluation_files import read_evaluations
from fast_attention.protein_lm.evaluation.ngrams import load_baselines
from fast_attention.protein_lm.evaluation.run_description import describe_run
from fast_attention.protein_lm.files.npz_files import read_npz
from fast_attention.protein_lm.finetune import lora
from fast_attention.protein_lm.finetune.finetuned import FineTuned, fingerprint
from fast_attention.protein_lm.finetune.linear_head import LinearHead
from fast_attention.protein_lm.loading import open_run
from fast_attention.protein_lm.runs import checkpoints, exporting, model_file
from fast_attention.protein_lm.runs.data_record import read_record
from fast_attention.protein_lm.runs.metrics_log import read_metrics
from fast_attention.protein_lm.runs.run_folder import RunFolder
from tests.protein_lm.hostile_files import change, watched

CHANGES = 300
MEGABYTES = 600


def make():
    return FlaxLM(
        make_protein_domain(length=16),
        attention_fn=make_fast_softmax_attention(nb_features=4),
        emb_dim=4,
        num_heads=1,
        num_layers=1,
        qkv_dim=4,
        mlp_dim=4,
        positions="rotary",
    )


@pytest.fixture(scope="module")
def model():
    model = make()
    assert model.state is not None
    return model


@pytest.fixture(scope="module")
def sound(model, tiny_fasta, tmp_path_factory):
    """A run, an export of it and two predictors, made without training."""
    folder = tmp_path_factory.mktemp("sound")
    run = RunFolder(folder / "run")
    run.path.mkdir()
    run.model.write_text(model_file.to_text(model_file.describe(model)))
    run.metrics.write_text('{"step": 1, "split": "train", "loss": 3.0}\n' * 3)
    scores = [{"name": "this model", "perplexity": 20.0, "accuracy": 0.1}]
    about = {"objective": None, "fasta": ["a.fasta"], "digest": None, "proteins": 1, "residues": 9}
    run.evaluation.write_text(model_file.to_text(about | {"scores": scores}))
    entry = {"file": "a.fasta", "sha256": "0" * 64, "bytes": 3, "weight": None}
    run.data.write_text(model_file.to_text({"train": [entry], "valid": [], "test": []}))
    ngrams = evaluation.fit_baselines([tiny_fasta], model.domain)
    evaluation.save_baselines(run.baselines, ngrams)
    with checkpoints.open_checkpoints(run.checkpoints) as manager:
        checkpoints.save(manager, model.state, checkpoints.Progress({"a": 1}, 2, 3, 4.0))
    exporting.export_model(model, run, folder / "export", step=0, tokens=3)
    head = LinearHead(*(np.ones(shape, np.float32) for shape in ((4,), (4,), (4, 1), (1,))))
    adapters = lora.init_adapters(model.weights, 2, jax.random.key(0))
    for method in ("lora", "full"):
        tuned = FineTuned(model, None, head, method, None, fingerprint(model), (adapters, 1.0))
        tuned.save(folder / method, run_dir=run.path)
    return folder


@pytest.fixture
def readers(model):
    """What reads each file, by its place in the folder of `sound`."""
    abstract = model.abstract_state

    def read_export(path):
        about = model_file.read(path.parent / "model.json")
        return exporting.read_arrays(RunFolder(path.parent), about, abstract)

    def read_checkpoint(path):
        step = next(parent for parent in path.parents if parent.parent.name == "checkpoints")
        return checkpoints.restore_model(step.parent, abstract)

    return {
        "run/model.json": lambda path: open_run(path.parent),
        "run/data.json": lambda path: read_record(RunFolder(path.parent)),
        "run/metrics.jsonl": read_metrics,
        "run/baselines.npz": load_baselines,
        "run/evaluation.json": lambda path: read_evaluations(RunFolder(path.parent)),
        "export/model.safetensors": read_export,
        "full/model.npz": lambda path: FineTuned.load(path.parent, model=model),
        "full/head.npz": lambda path: FineTuned.load(path.parent, model=model),
        "lora/finetuned.json": lambda path: FineTuned.load(path.parent, model=model),
        "lora/adapters.npz": lambda path: FineTuned.load(path.parent, model=model),
        "run/checkpoints/0": read_checkpoint,
    }


FILES = (
    "run/model.json",
    "run/data.json",
    "run/metrics.jsonl",
    "run/baselines.npz",
    "export/model.safetensors",
    "full/model.npz",
    "full/head.npz",
    "lora/finetuned.json",
    "lora/adapters.npz",
    "run/evaluation.json",
    "run/checkpoints/0",
)


@pytest.fixture
def collected():
    """Lets asyncio report what orbax left unread in this test, not in the one that follows."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_gives_a_result_or_one_line(
    name, sound, readers, collected, tmp_path, capsys
):
    whole = tmp_path / "whole"
    shutil.copytree(sound, whole)
    outside = tmp_path / "outside"
    outside.write_text("kept")
    Path(whole / "planted_module.py").write_text("raise SystemExit('imported')")
    # Seeds of strings are equal in all processes.
    draw = random.Random(f"{name} 1")
    target = whole / name
    files = [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file())
    contents = {path: path.read_bytes() for path in files}
    read = readers[name]
    read(files[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    cache = jax.config.jax_compilation_cache_dir or whole
    for number in range(CHANGES):
        path = draw.choice(files)
        with watched(whole, cache) as found:
            change(path, draw, outside)
            try:
                read(path)
            except RunError as error:
                refused += 1
                told = str(error)
                assert "\n" not in told, (number, told)
                assert str(whole) in told and len(told) < 1500, (number, told)
        assert not found, (number, found)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(contents[path])
        capsys.readouterr()
    assert refused > 10
    assert outside.read_text() == "kept"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < MEGABYTES, f"{grown} MB more"


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def archive(path, header, content, compression=zipfile.ZIP_STORED):
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("mean.npy", member.getvalue() + content)
    return path


def test_arrays_of_absurd_sizes_are_refused_before_memory_is_taken(tmp_path):
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    with pytest.raises(RunError, match=r"a\.npz is damaged .*does not have its declared size"):
        read_npz(archive(tmp_path / "a.npz", header, b"1234"), "fetch it again", limit=2**20)
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**23,)}
    path = archive(tmp_path / "b.npz", header, bytes(2**25), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(
        RunError, match=r"b\.npz is damaged .it declares 33,554,\d+ bytes, at most 1,048"
    ):
        read_npz(path, "fetch it again", limit=2**20)
    assert read_npz(path, "fetch it again", limit=2**26)["mean"].shape == (2**23,)


def test_no_pickle_is_read(tmp_path):
    mark = tmp_path / "executed"
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    path = archive(tmp_path / "a.npz", header, pickle.dumps([Payload(mark)]))
    with pytest.raises(RunError, match=r"a\.npz is damaged"):
        read_npz(path, "fetch it again", limit=2**20)
    assert not mark.exists()


def test_checksums_of_archives_are_compared(tmp_path):
    np.savez(tmp_path / "a.npz", allow_pickle=False, mean=np.zeros(8, np.float32))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(bytes(32)) + 5] = 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(RunError, match="checksum"):
        read_npz(tmp_path / "a.npz", "fetch it again", limit=2**20)


def test_a_checkpoint_that_cannot_hold_the_model_is_refused(sound, tmp_path):
    shutil.copytree(sound / "run" / "checkpoints", tmp_path / "checkpoints")
    big = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((2**20, 2**20), leaf.dtype), make().abstract_state
    )
    with pytest.raises(RunError, match="cannot hold"):
        checkpoints.restore_model(tmp_path / "checkpoints", big)


@pytest.mark.parametrize("name", ["model.json", "checkpoints", "baselines.npz"])
def test_links_out_of_a_run_are_refused(sound, tmp_path, name):
    shutil.copytree(sound / "run", tmp_path / "run")
    moved = tmp_path / "elsewhere"
    (tmp_path / "run" / name).rename(moved)
    (tmp_path / "run" / name).symlink_to(moved)
    with pytest.raises(RunError, match=f"{name} is a link that leads out of"):
        describe_run(tmp_path / "run", with_corpus=False)
        load_baselines(RunFolder(tmp_path / "run").baselines)
    # A link that stays inside is as good as the file.
    moved.rename(tmp_path / "run" / "inside")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to("inside")
    assert describe_run(tmp_path / "run", with_corpus=False)["step"] == 0
