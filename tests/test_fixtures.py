"""Every golden case in the repository, and the runner's own honesty."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.fixtures.__main__ import main
from tests.fixtures.compare import close
from tests.fixtures.kernels import kernel
from tests.fixtures.registry import NOT_BUILT, PASSED, run_file
from tests.test_fixtures_of_models import FILES, FOLDER, MODELS

pytestmark = pytest.mark.usefixtures("optimized")

# Whole models are in test_fixtures_of_models.py, so that another process can run them.
FUNCTIONS = [path for path in FILES if not path.name.startswith(MODELS)]


@pytest.mark.parametrize("path", FUNCTIONS, ids=lambda path: path.stem)
def test_agrees_with_the_original(path):
    outcome = run_file(path)
    assert outcome.status == PASSED, str(outcome)


def altered(source: Path, target: Path, change) -> Path:
    with np.load(source) as archive:
        arrays = {name: archive[name] for name in archive.files}
    meta = json.loads(str(arrays["meta"]))
    change(arrays, meta)
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez(target, **arrays)
    return target


def shift_output(arrays, meta):
    arrays["output/out_exact64"] = arrays["output/out_exact64"] + 1e-3


def shift_gradient(arrays, meta):
    arrays["grad_exact/k"] = arrays["grad_exact/k"] * 1.001


def shift_output_without_exact(arrays, meta):
    shift_output(arrays, meta)
    arrays["output/out"] = arrays.pop("output/out_exact64")
    meta["tolerance"] = {"output/out": meta["tolerance"]["output/out_exact64"]}


def other_projection(arrays, meta):
    arrays["input/projection_matrix"] = arrays["input/projection_matrix"][::-1] * 1.01


def unknown_keyword(arrays, meta):
    meta["kwargs"]["no_such_option"] = 1


def unknown_class(arrays, meta):
    meta["class"] = "Nothing"


def unknown_kernel(arrays, meta):
    meta["kwargs"]["kernel_fn"] = "no such kernel"


def not_a_number(arrays, meta):
    arrays["input/v"][0, 0] = np.nan


def nothing_expected(arrays, meta):
    for name in list(arrays):
        if name.startswith(("output/", "grad")):
            del arrays[name]


@pytest.mark.parametrize(
    "change",
    [
        shift_output,
        shift_gradient,
        shift_output_without_exact,
        other_projection,
        unknown_keyword,
        unknown_kernel,
        not_a_number,
        nothing_expected,
    ],
)
def test_a_wrong_number_or_keyword_fails(tmp_path, change, capsys):
    path = altered(FOLDER / "google_generalized_ortho_exp.npz", tmp_path / "case.npz", change)
    assert main([str(path)]) == 1
    assert "0 passed, 1 failed, 0 not built yet" in capsys.readouterr().out


def test_original_output_counts_where_no_exact_value_is_given(tmp_path):
    def drop_exact(arrays, meta):
        for name in [name for name in arrays if "exact" in name]:
            del arrays[name]
        meta["tolerance"] = {"output/out": meta["tolerance"]["output/out_exact64"]}

    path = altered(
        FOLDER / "google_generalized_ortho_relu_causal.npz", tmp_path / "case.npz", drop_exact
    )
    outcome = run_file(path)
    assert outcome.status == PASSED, str(outcome)
    assert outcome.detail.startswith("4 compared")


def test_no_axis_means_every_middle_axis(tmp_path):
    def forget_axis(arrays, meta):
        meta["call"]["axis"] = None

    path = altered(FOLDER / "google_softmax_2d_axes.npz", tmp_path / "case.npz", forget_axis)
    outcome = run_file(path)
    assert outcome.status == PASSED, str(outcome)


def test_compares_only_where_the_file_says_so(tmp_path):
    def spoil_elsewhere(arrays, meta):
        kept = np.ones(arrays["input/q"].shape[:2], bool)
        kept[:, 5:] = False
        arrays["input/kept"] = kept
        arrays["output/out_exact64"][:, 5:] = np.nan
        meta["compare_only_where"] = "kept"

    path = altered(FOLDER / "google_softmax_causal.npz", tmp_path / "case.npz", spoil_elsewhere)
    outcome = run_file(path)
    assert outcome.status == PASSED, str(outcome)


def test_a_folder_is_counted_and_other_files_are_told_apart(tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "good.npz").write_bytes(
        (FOLDER / "google_generalized_ortho_cos.npz").read_bytes()
    )
    later = altered(FOLDER / "lat_image_attention.npz", tmp_path / "later.npz", unknown_class)
    assert run_file(later).status == NOT_BUILT
    (tmp_path / "notes.md").write_text("not a case")
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert "not built yet: linear-attention-transformer Nothing" in out[1]
    assert out[-1] == "1 passed, 0 failed, 1 not built yet"

    (tmp_path / "broken.npz").write_text("no archive")
    assert main([str(tmp_path)]) == 1
    assert "not a fixture file" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no/such/path"]])
def test_a_call_without_cases_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_an_empty_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2
    assert "no .npz or .json file" in capsys.readouterr().err


def test_shape_and_nan_are_never_close():
    expected = np.zeros((2, 3))
    assert close("x", np.zeros((3, 2)), expected, atol=1.0, rtol=0.0).ratio == np.inf
    assert close("x", np.full((2, 3), np.nan), expected, atol=1.0, rtol=0.0).ratio == np.inf
    assert close("x", [-np.inf, 1.0], np.array([-np.inf, 1.0]), atol=0.0, rtol=0.0).ratio == 0
    assert close("x", [0.0, 1.0], np.array([-np.inf, 1.0]), atol=1.0, rtol=0.0).ratio == np.inf


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("relu", [-1.0, 2.0], [0.0, 2.0]),
        ("elu+1", [-1.0, 2.0], [np.exp(-1.0), 3.0]),
        ("jshiftedelu", [-1.0, 2.0], [np.exp(-1.0), 3.0]),
        ("squared relu", [-1.0, 3.0], [0.0, 9.0]),
        ("jrequ", [-1.0, 3.0], [0.0, 9.0]),
        ("jax.nn.sigmoid", [0.0], [0.5]),
        ("jgelu", [1.0], [0.8413447460685429]),
        ("jnp.tanh", [0.0], [0.0]),
        ("identity", [-3.0], [-3.0]),
    ],
)
def test_kernels_by_every_spelling(name, x, expected):
    np.testing.assert_allclose(kernel(name)(jnp.array(x)), expected, rtol=1e-6)
