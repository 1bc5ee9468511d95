"""The folder of a predictor is data: what cannot be right in it is an error that names the file."""

import argparse
import json
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from fast_attention.protein_lm import FlaxLM, make_protein_domain
from fast_attention.protein_lm.cli import arguments
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation.groups import make_groups
from fast_attention.protein_lm.files.output_targets import OutputError
from fast_attention.protein_lm.finetune import finetuning, lora
from fast_attention.protein_lm.finetune.finetuned import FineTuned, fingerprint
from fast_attention.protein_lm.finetune.labelled import choose_parts
from fast_attention.protein_lm.finetune.linear_head import LinearHead
from fast_attention.protein_lm.finetune.predictor_information import format_predictor
from fast_attention.protein_lm.finetune.tuning_run import format_result


@pytest.fixture(scope="module")
def model():
    return FlaxLM(
        make_protein_domain(length=8), emb_dim=4, num_heads=1, qkv_dim=4, mlp_dim=4, num_layers=1
    )


@pytest.fixture
def folder(model, tmp_path):
    """A predictor of two classes, with adapters, made without training."""
    head = LinearHead(*(np.ones(shape, np.float32) for shape in ((4,), (4,), (4, 2), (2,))))
    adapters = lora.init_adapters(model.weights, 2, jax.random.key(0))
    trunk = fingerprint(model)
    FineTuned(model, ("a", "b"), head, "lora", 8, trunk, (adapters, 1.0)).save(tmp_path / "new")
    return tmp_path / "new"


def change_arrays(path, change):
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, allow_pickle=False, **arrays)


def test_a_sound_folder_is_read(folder, model):
    found = FineTuned.load(folder, model=model)
    assert found.classes == ("a", "b")
    assert found.adapters is not None
    expected = lora.init_adapters(model.weights, 2, jax.random.key(0))
    assert found.adapters[0].keys() == expected.keys()
    for name, pair in expected.items():
        for part, array in pair.items():
            np.testing.assert_array_equal(found.adapters[0][name][part], array)


def test_only_a_saved_predictor_is_replaced(folder, model, tmp_path):
    predictor = FineTuned.load(folder, model=model)
    predictor.save(folder)
    model.save(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "head.npz").write_text("mine")
    (folder / "result.json").write_text("{}")
    for other, told in (
        ("model", "holds an exported model"),
        ("notes", "head.npz would be overwritten"),
        ("new", "holds the result of a command"),
    ):
        before = {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()}
        with pytest.raises(RunError, match=told):
            predictor.save(tmp_path / other, whole=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()} == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # Each class is the name of a column.
        ("classes", []),
        ("classes", ["a"]),
        ("classes", ["a", "a"]),
        ("classes", ["a", "\ud800"]),
        ("max_length", 0),
        ("max_length", 2**40),
        # Without a scale, adapters would be read and left out.
        ("adapter_scale", None),
        ("adapter_scale", 0),
        ("adapter_scale", 1e300),
        ("run_dir", "run\0"),
    ],
)
def test_a_value_out_of_range_is_named(name, value, folder, model):
    path = folder / "finetuned.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(RunError, match=rf"finetuned\.json: {name} is .+; expected "):
        FineTuned.load(folder, model=model)


@pytest.mark.parametrize(
    "change",
    [
        # Adapters that are missing would be left out of the sum.
        lambda arrays: arrays.clear(),
        lambda arrays: arrays.pop(max(arrays)),
        lambda arrays: arrays.update({"more.a": np.ones((4, 2))}),
        lambda arrays: arrays.update({min(arrays): np.ones((4, 3))}),
        lambda arrays: arrays.update({name: array[:0] for name, array in arrays.items()}),
        lambda arrays: arrays[min(arrays)].fill(np.nan),
    ],
)
def test_adapters_are_those_of_the_model(change, folder, model):
    change_arrays(folder / "adapters.npz", change)
    with pytest.raises(RunError, match=r"adapters\.npz"):
        FineTuned.load(folder, model=model)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("kernel", np.full((4, 2), np.nan), "'kernel' has numbers that are not finite"),
        ("bias", np.array([np.inf, 0]), "'bias' has numbers that are not finite"),
        ("scale", np.zeros(4), "'scale' has numbers that are not above 0"),
    ],
)
def test_a_head_has_numbers_that_predict(name, value, told, folder, model):
    change_arrays(folder / "head.npz", lambda arrays: arrays.update({name: value}))
    with pytest.raises(RunError, match=rf"head\.npz: {told}"):
        FineTuned.load(folder, model=model)


def test_one_long_name_takes_its_own_space_only():
    labels = ["x" * 10**6, *"abcdefgh" * 250]
    number = len(labels)
    tracemalloc.start()
    try:
        groups = make_groups("family", labels)
        parts = choose_parts(number, None, labels, test_share=0.2, valid_share=0.1, seed=0)
        classes, _ = finetuning._targets("classification", labels, np.arange(1, number))
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert groups.labels == sorted(set(labels)) == list(classes or ())
    assert set(parts) == {"train", "valid", "test"}


def test_a_name_cannot_look_like_other_lines():
    names = ("folder", "method", "run_dir")
    about = {name: f"{name}\nuse             another" for name in names}
    about |= {"classes": ["a\nb", "c"], "max_length": None, "whole": False, "metrics": None}
    assert len(format_predictor(about).splitlines()) == 6
    figures = {
        "proteins": 30,
        "shared": 0,
        "spearman": 0.5,
        "r2": 0.2,
        "rmse": 1,
        "rmse_of_mean": 1,
    }
    result = {"classes": None, "metrics": {"test": figures}}
    assert format_result(result, Path("a\nb")).splitlines()[-1].startswith("written to a\\nb: ")


def test_the_run_that_a_predictor_names_is_an_input(model, folder, tmp_path):
    tuned = FineTuned.load(folder, model=model)
    run = tmp_path / "run" / "model.json"
    run.parent.mkdir()
    run.write_text("{}")
    tuned.save(folder, run_dir=run.parent)
    (tmp_path / "link.tsv").symlink_to(run)
    options = argparse.Namespace(model=str(folder), run_dir=None, output=tmp_path / "link.tsv")
    with pytest.raises(OutputError, match="is the same file as the input .*run/model.json"):
        arguments.check_files(options, "output")


def test_a_folder_that_is_absent_is_told(tmp_path):
    with pytest.raises(RunError, match=r"nowhere: no such folder; check the path"):
        FineTuned.load(tmp_path / "nowhere")
