"""A tiny trained model is made linear: stages, what stays exact, resuming, the folder."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.models import TransformerConfig
from fast_attention.protein_lm import FlaxBERT, FlaxLM, cli, make_protein_domain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.linearize import run, training
from fast_attention.protein_lm.linearize.config import LinearizeConfig
from fast_attention.protein_lm.linearize.report import format_report, read_report
from fast_attention.protein_lm.linearize.run import run_linearize
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.runs.importing import import_model

PRETRAINED = Path(__file__).parents[2] / "data" / "pretrained"
SIZES = {"emb_dim": 16, "num_heads": 2, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 16}
RATES = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "proteins.fasta"
    proteins = ["".join(rng.choice(list("ACDEFGHIKL"), 12)) for _ in range(20)]
    path.write_text("".join(f">p{i}\n{protein}\n" for i, protein in enumerate(proteins)))
    return path


@pytest.fixture(scope="module")
def make_exact(tmp_path_factory):
    return functools.cache(functools.partial(save_exact, tmp_path_factory.mktemp("exact")))


def save_exact(folder, model_cls):
    """A model whose queries and keys are large enough for attention to matter."""
    model = model_cls(make_protein_domain(length=12), batch_size=4, **SIZES, **RATES)
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: 6 * x if "'query'" in jax.tree_util.keystr(path) else x, model.weights
    )
    model.set_parameters(weights, model.state.variables)
    model.save(folder / model_cls.__name__)
    return folder / model_cls.__name__


def arrays(folder):
    model = load_run(folder).model
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.weights)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def settings(**options):
    small = {"transfer_steps": 12, "finetune": "none", "batch_size": 4, "save_every": 4}
    return LinearizeConfig(**small | {"finetune_rate": 1e-3, "transfer_rate": 3e-2} | options)


@pytest.mark.parametrize("model_cls", [FlaxLM, FlaxBERT])
def test_transfer_lowers_errors_and_changes_features_alone(model_cls, make_exact, fasta, tmp_path):
    exact = make_exact(model_cls)
    report = run_linearize(exact, tmp_path / "new", [fasta], config=settings(keep_exact=1))
    found = report["found"]
    ranking = found["ranking"]["errors"]
    (kept,) = report["exact_layers"]
    assert ranking[kept - 1] == max(ranking)
    before, after = (found[name]["errors"] for name in ("before", "transfer"))
    assert before[kept - 1] == after[kept - 1] == 0
    assert after[2 - kept] < 0.97 * before[2 - kept]
    assert set(found) == {"exact", "ranking", "before", "transfer"}
    assert json.loads((tmp_path / "new" / "linearize.json").read_text()) == report
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        *("linearize.json", "linearize.png", "model.json", "model.safetensors")
    }
    old, new = arrays(exact), arrays(tmp_path / "new")
    features = {name for name in new if "'projections'" in name}
    assert set(new) - features == set(old) and len(features) == 2
    assert all(np.array_equal(new[name], old[name]) for name in old)
    model = load_run(tmp_path / "new").model
    assert model.config.exact_layers == (kept,)
    assert model.evaluate(["ACDEFGHIKL"])["perplexity"] > 0


def test_an_interrupted_run_ends_as_one_that_was_not(
    make_exact, fasta, tmp_path, monkeypatch, capsys
):
    """Killed in the first stage, and in the second; the window and the features are measured."""
    exact = make_exact(FlaxLM)
    options = settings(finetune="lora", finetune_steps=8, exact_window=2)
    whole = run_linearize(exact, tmp_path / "whole", [fasta], config=options)
    save, count = training.StateFile.save, iter(range(100))

    def save_and_stop(self, *args):
        save(self, *args)
        if next(count) in (1, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(training.StateFile, "save", save_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_linearize(exact, tmp_path / "parts", [fasta], config=options)
    parts = run_linearize(exact, tmp_path / "parts", [fasta], config=options)
    for name, figures in whole["found"].items():
        assert (name, parts["found"][name]) == (name, figures)
    assert parts == whole
    assert set(whole["found"]) == {
        *("exact", "ranking", "before", "transfer", "finetune", "window_off", "features_off")
    }
    one, other = arrays(tmp_path / "whole"), arrays(tmp_path / "parts")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    # A finished folder is reported, and not that of other settings.
    command = ["linearize", f"--run_dir={exact}", f"--work_dir={tmp_path / 'parts'}"]
    command += [f"--fasta={fasta}", "--transfer_steps=12", "--finetune_steps=8", "--batch_size=4"]
    command += ["--exact_window=2", "--save_every=4", "--transfer_rate=3e-2"]
    assert cli.main([*command, "--finetune_rate=1e-3"]) == 0
    assert "parts is finished" in capsys.readouterr().out
    with pytest.raises(RunError, match="the result of another model, data or settings"):
        run_linearize(exact, tmp_path / "parts", [fasta], config=settings())


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_a_step_gets_arrays_placed_as_it_returns_them(
    finetune, make_exact, fasta, tmp_path, monkeypatch
):
    """Else its second call would compile again."""
    placed = []

    def watch(make):
        def watched(step, *arguments):
            placed.append([x.sharding for x in jax.tree.leaves(arguments[:2])])
            return step(*arguments)

        return lambda *arguments: functools.partial(watched, make(*arguments))

    for name in ("make_transfer_step", "make_finetune_step"):
        monkeypatch.setattr(run.steps, name, watch(getattr(run.steps, name)))
    options = settings(transfer_steps=2, finetune=finetune, finetune_steps=2)
    run_linearize(make_exact(FlaxLM), tmp_path / "new", [fasta], config=options)
    first, second, third, fourth = placed
    assert first == second and third == fourth


def test_what_is_not_exact_is_refused(fasta, tmp_path):
    domain = make_protein_domain(length=12)
    linear = FlaxLM(domain, attention_fn=make_fast_softmax_attention(), **SIZES, **RATES)
    linear.save(tmp_path / "linear")
    with pytest.raises(RunError, match="FastAttention, not exact attention"):
        run_linearize(tmp_path / "linear", tmp_path / "new", [fasta])
    FlaxLM(domain, **SIZES, **RATES).save(tmp_path / "exact")
    with pytest.raises(RunError, match="keep_exact=2 leaves no layer"):
        run_linearize(tmp_path / "exact", tmp_path / "new", [fasta], config=settings(keep_exact=2))
    with pytest.raises(RunError, match="holds an exported model"):
        run_linearize(tmp_path / "exact", tmp_path / "linear", [fasta])
    with pytest.raises(ValueError, match=r"exact_layers are numbers of layers, 1 to 6, got \[7\]"):
        TransformerConfig(30, exact_layers=(7,))
    with pytest.raises(ValueError, match="finetune must be one of none, lora, full"):
        settings(finetune="some")


def state_file(path, about, **arrays):
    text = about if isinstance(about, str) else json.dumps(about)
    np.savez(path, about=np.frombuffer(text.encode(), np.uint8), **arrays)
    return path


ABOUT = {"asked": {"data": "a"}, "found": {}, "stage": "transfer", "step": 2}


@pytest.mark.parametrize(
    "about",
    [
        "{",
        "[" * 100_000,
        [],
        {},
        ABOUT | {"asked": []},
        ABOUT | {"found": []},
        ABOUT | {"found": {"exact": 3}},
        ABOUT | {"found": {"exact": {}}},
        ABOUT | {"found": {"exact": {"perplexity": "low"}}},
        ABOUT | {"found": {"ranking": {"errors": [0.1]}}},
        ABOUT | {"found": {"other": {"perplexity": 1.0}}},
        ABOUT | {"stage": 1},
        ABOUT | {"step": "2"},
        {name: value for name, value in ABOUT.items() if name != "stage"},
    ],
)
def test_a_damaged_state_is_named(about, tmp_path):
    path = state_file(tmp_path / "state.npz", about)
    with pytest.raises(RunError, match=r"state\.npz"):
        training.StateFile(path, ABOUT["asked"], 2)


def test_a_state_takes_no_more_memory_than_what_is_trained(tmp_path):
    """Arrays of other shapes are refused by what the file promises, without reading them."""
    huge = np.zeros(2**24, np.float32)
    path = state_file(tmp_path / "state.npz", ABOUT, **{"0": huge})
    read = training.StateFile(path, ABOUT["asked"], 2)
    with pytest.raises(RunError, match=r"state\.npz is damaged .it declares 67,"):
        read.resume("transfer", [np.zeros(3, np.float32)])
    path = state_file(tmp_path / "state.npz", ABOUT, **{"0": np.zeros(3)})
    read = training.StateFile(path, ABOUT["asked"], 2)
    with pytest.raises(RunError, match="'0' is float64, expected float32: remove it"):
        read.resume("transfer", [np.zeros(3, np.float32)])
    assert read.resume("finetune", [1]) == (0, [1])


@pytest.mark.parametrize(
    "change",
    [
        lambda report: [],
        lambda report: {"asked": report["asked"]},
        lambda report: report | {"exact_layers": 3},
        lambda report: report | {"found": {}},
        lambda report: report | {"found": report["found"] | {"exact": {"perplexity": "1"}}},
        lambda report: report | {"found": report["found"] | {"ranking": {"errors": "ab"}}},
    ],
)
def test_a_damaged_report_is_named(change, tmp_path):
    found = {"exact": {"perplexity": None}, "ranking": {"errors": [0.5, None]}}
    report = {"asked": {}, "attention": {}, "exact_layers": [1], "proteins": [2, 3], "found": found}
    path = tmp_path / "linearize.json"
    path.write_text(json.dumps(report))
    # What JSON has no number for is printed as none.
    assert "nan" in format_report(read_report(path, 2))
    path.write_text(json.dumps(change(report)))
    with pytest.raises(RunError, match=r"linearize\.json"):
        read_report(path, 2)


@pytest.mark.parametrize("name", ["linearize.json", "linearize.png", "linearize_state.npz"])
def test_files_that_are_in_the_way_are_told_before_any_work(name, fasta, tmp_path):
    """A link out of the folder, and a file that belongs to somebody else."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match=f"{name} is a link that leads out of"):
        run_linearize(tmp_path / "absent", tmp_path / "new", [fasta])
    assert not (tmp_path / "precious").exists()
    (tmp_path / "new" / name).unlink()
    (tmp_path / "new" / "model.json").write_text("mine")
    with pytest.raises(RunError, match=r"model\.json would be overwritten"):
        run_linearize(tmp_path / "absent", tmp_path / "new", [fasta])


def test_a_model_without_its_report_is_gone_on_from(make_exact, fasta, tmp_path, monkeypatch):
    """Nothing is trained, and the process is killed after the model was written."""
    exact = make_exact(FlaxLM)
    options = settings(estimator="favor+", nb_features=8)
    with monkeypatch.context() as patched:
        patched.setattr(run, "draw_errors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_linearize(exact, tmp_path / "new", [fasta], config=options)
    report = run_linearize(exact, tmp_path / "new", [fasta], config=options)
    assert set(report["found"]) == {"exact", "ranking", "before"}
    state = tmp_path / "new" / "linearize_state.npz"
    assert not state.exists()
    # Killed between the report and the removal of the state.
    state.write_bytes(b"old")
    assert run_linearize(exact, tmp_path / "new", [fasta], config=options) == report
    assert not state.exists()


def test_what_is_left_out_is_told(make_exact, fasta, tmp_path, capsys):
    (tmp_path / "a.fasta").write_text(fasta.read_text() + ">bad\nAC1D\n")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "linearize.json").write_text("{}")
    (tmp_path / "new" / "model.safetensors").touch()
    with pytest.raises(RunError, match=r"linearize\.json: asked is missing"):
        run_linearize(make_exact(FlaxLM), tmp_path / "new", [tmp_path / "a.fasta"], on_error="skip")
    assert "1 of 21 records was left out" in capsys.readouterr().err


def test_an_imported_model_is_made_linear(fasta, tmp_path):
    """Features are added, all else stays as it was published."""
    import_model(PRETRAINED / "esm2_tiny", tmp_path / "exact")
    options = settings(nb_features=8, exact_window=2, transfer_steps=4)
    found = run_linearize(tmp_path / "exact", tmp_path / "new", [fasta], config=options)["found"]
    assert set(found) >= {"exact", "before", "transfer", "window_off", "features_off"}
    assert found["transfer"]["errors"] != found["before"]["errors"]
    old, new = arrays(tmp_path / "exact"), arrays(tmp_path / "new")
    assert all("'projections'" in name for name in set(new) - set(old))
    assert all(np.array_equal(new[name], old[name]) for name in old)
    assert load_run(tmp_path / "new").model.evaluate(["ACDEFGHIKL"])["perplexity"] > 0
