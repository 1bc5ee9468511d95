import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from fast_attention.protein_lm import cli, read_fasta, write_fasta
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.runs.exporting import export_model


@pytest.fixture(scope="module", params=["lm_run", "bert_run"])
def exported(request, tmp_path_factory):
    run = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("exports") / "model"
    assert cli.main(["export", f"--run_dir={run}", f"--output={folder}"]) == 0
    return run, folder


def fails(arguments, capsys):
    assert cli.main(arguments) == 1
    return capsys.readouterr().err


def test_an_exported_model_is_the_model_bit_by_bit(exported):
    run, folder = exported
    before, after = load_run(run), load_run(folder)
    assert type(before.model) is type(after.model) and before.step == after.step == 12
    assert before.model.config == after.model.config
    for part in ("parameters", "variables"):
        one, two = (getattr(loaded.model.state, part) for loaded in (before, after))
        jax.tree.map(np.testing.assert_array_equal, one, two)
    sequence = ["MKTAYIAKQR"]
    np.testing.assert_array_equal(before.model.logits(sequence), after.model.logits(sequence))
    assert type(FlaxModel.load(folder)) is type(before.model)


def test_the_files_explain_themselves(exported):
    run, folder = exported
    about = json.loads((folder / "model.json").read_text())
    assert about["transformer"]["emb_dim"] == 32 and about["exported"]["step"] == 12
    assert about["attention"]["factory"] == "make_fast_softmax_attention"
    assert about["attention"]["arguments"]["nb_features"] == 16
    assert about["alphabet"]["tokens"][:3] == ["A", "C", "D"]
    assert (folder / "config.gin").read_text() == (run / "config.gin").read_text()
    assert about["exported"]["tokens"] > 0
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    sizes = [array.size for name, array in arrays.items() if name.startswith("parameters.")]
    assert sum(sizes) == about["exported"]["parameters"]["total"]
    assert arrays["parameters.embed.embedding"].shape == (29, 32)


def test_an_exported_model_works_and_is_exported_again(exported, tiny_fasta, tmp_path):
    _, folder = exported
    figures, again = tmp_path / "figures.json", tmp_path / "again"
    arguments = ["evaluate", f"--run_dir={folder}", f"--fasta={tiny_fasta}", f"--output={figures}"]
    assert cli.main(arguments) == 0
    assert cli.main(["export", f"--run_dir={folder}", f"--output={again}"]) == 0
    for name in ("model.json", "model.safetensors", "config.gin", "baselines.npz"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_the_space_for_rounded_parameters(lm_run, tmp_path, dtype, digits):
    for name, more in (("whole", []), ("half", [f"--dtype={dtype}"])):
        assert (
            cli.main(["export", f"--run_dir={lm_run}", f"--output={tmp_path / name}", *more]) == 0
        )
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    whole, half = (load_run(tmp_path / name).model for name in ("whole", "half"))

    def check(one, two):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=digits, atol=2**-25)

    jax.tree.map(check, whole.weights, half.weights)
    np.testing.assert_allclose(
        *(model.score(["MKTAYIAKQR"])[0].log_likelihood for model in (whole, half)), rtol=0.02
    )


def test_numbers_too_large_for_half_the_space_are_refused(lm_run):
    model, step, folder = load_run(lm_run)
    weights = jax.tree.map(lambda x: x * 1e9, model.weights)
    model.set_parameters(weights, model.state.variables)
    with pytest.raises(ValueError, match="too large for float16: export as bfloat16"):
        export_model(model, folder, folder.path / "x", step=step, tokens=None, dtype="float16")
    assert not (folder.path / "x").exists()


def test_a_family_is_learned_from_an_export(exported, tiny_fasta, tmp_path):
    run, folder = exported
    family = tmp_path / "family.fasta"
    write_fasta(family, list(read_fasta(tiny_fasta))[:40])
    arguments = [f"--fasta={family}", "--epochs=1", "--batch_size=8"]
    for name, start in (("a", run), ("b", folder)):
        output = f"--output={tmp_path / name}"
        assert cli.main(["fine-tune", f"--run_dir={start}", output, *arguments]) == 0
    one, two = (load_run(tmp_path / name).model for name in ("a", "b"))
    jax.tree.map(np.testing.assert_array_equal, one.weights, two.weights)


def test_a_family_is_learned_by_a_model_of_no_run(lm_run, tmp_path):
    """Models of Python, linearized and imported ones have no settings of a training."""
    FlaxModel.load(lm_run).save(tmp_path / "model")
    family, output = tmp_path / "family.fasta", tmp_path / "run"
    family.write_text(">a\n" + 12 * "MKTAYIAKQR" + "\n>b\nMKTAYIAKQW\n")
    arguments = [f"--run_dir={tmp_path / 'model'}", f"--fasta={family}", f"--output={output}"]
    assert cli.main(["fine-tune", *arguments, "--epochs=1"]) == 0
    assert load_run(output).step == 1


def test_what_cannot_be_read_or_written_is_told(lm_run, tmp_path, capsys):
    assert "a folder of its own" in fails(
        ["export", f"--run_dir={lm_run}", f"--output={lm_run}"], capsys
    )
    folder = tmp_path / "model"
    assert cli.main(["export", f"--run_dir={lm_run}", f"--output={folder}"]) == 0
    again = ["export", f"--run_dir={folder}", f"--output={tmp_path / 'other'}"]
    assert "folder of its own" in fails([*again[:2], f"--output={folder}"], capsys)
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays["parameters.head.bias"] = arrays["parameters.head.bias"][:3]
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    assert "parameters.head.bias is float32[3] there" in fails(again, capsys)
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be read" in fails(again, capsys)
    about = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(about | {"format_version": 99}))
    assert "format_version 99" in fails(again, capsys)
    (folder / "model.json").write_text("{}")
    assert "model.json describes no model" in fails(again, capsys)


def test_files_of_others_are_not_written_over(lm_run, tmp_path, capsys):
    (tmp_path / "model.json").write_text("mine")
    told = fails(["export", f"--run_dir={lm_run}", f"--output={tmp_path}"], capsys)
    assert "model.json would be overwritten" in told
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    assert (tmp_path / "model.json").read_text() == "mine"


def test_another_model_is_not_replaced_and_the_same_is_completed(
    lm_run, bert_run, tmp_path, capsys
):
    folder = tmp_path / "model"
    export = ["export", f"--output={folder}"]
    assert cli.main([*export, f"--run_dir={lm_run}"]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for other in ([f"--run_dir={bert_run}"], [f"--run_dir={lm_run}", "--dtype=float16"]):
        assert "holds another model" in fails([*export, *other], capsys)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # As after a crash between two files.
    (folder / "model.json").unlink()
    assert "holds another model" in fails([*export, f"--run_dir={bert_run}"], capsys)
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    assert cli.main([*export, f"--run_dir={lm_run}"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed


def test_an_export_without_its_arrays_is_called_that(exported, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(exported[1], folder)
    (folder / "model.safetensors").unlink()
    told = fails(
        ["score", f"--run_dir={folder}", "--fasta=x", f"--output={tmp_path / 'x.tsv'}"], capsys
    )
    assert "model.safetensors is missing: fetch the folder again" in told


def test_an_average_of_models(exported, tmp_path, capsys):
    run, folder = exported
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    other, average = tmp_path / "other", tmp_path / "average"
    shutil.copytree(folder, other)
    larger = {
        name: 3 * array if name.startswith("parameters.") else array
        for name, array in arrays.items()
    }
    metadata = {"format": "fast_attention.protein_lm"}
    safetensors.numpy.save_file(larger, other / "model.safetensors", metadata=metadata)
    export = ["export", f"--run_dir={run}", f"--average_with={other}"]
    assert cli.main([*export, f"--output={average}"]) == 0
    for name, array in safetensors.numpy.load_file(average / "model.safetensors").items():
        factor = 2 if name.startswith("parameters.") else 1
        np.testing.assert_allclose(array, factor * arrays[name], rtol=1e-6)
    before = (other / "model.safetensors").read_bytes()
    assert "holds an exported model already" in fails([*export, f"--output={other}"], capsys)
    assert (other / "model.safetensors").read_bytes() == before
    # The same folder under another name: it would count twice, or once where twice was meant.
    again = f"--average_with={other}/../other"
    assert cli.main([*export, again, f"--output={tmp_path / 'none'}"]) == 2
    assert "is given already" in capsys.readouterr().err
    # What only training uses may differ.
    about = json.loads((other / "model.json").read_text())
    about["transformer"] |= {"dropout_rate": 0.25, "remat": not about["transformer"]["remat"]}
    (other / "model.json").write_text(json.dumps(about))
    assert cli.main([*export, f"--output={tmp_path / 'again'}"]) == 0
    endless = {
        name: np.full_like(array, np.inf) if name.endswith("head.bias") else array
        for name, array in arrays.items()
    }
    safetensors.numpy.save_file(endless, other / "model.safetensors", metadata=metadata)
    told = fails([*export, f"--output={tmp_path / 'none'}"], capsys)
    assert "head.bias of the average is not finite" in told
    projections = {
        name: -array if name.startswith("variables.") else array for name, array in arrays.items()
    }
    safetensors.numpy.save_file(projections, other / "model.safetensors", metadata=metadata)
    told = fails([*export, f"--output={tmp_path / 'none'}"], capsys)
    assert "projections.0 differs" in told and "or rounded by export --dtype" in told
    about["transformer"]["shift_tokens"] = not about["transformer"]["shift_tokens"]
    (other / "model.json").write_text(json.dumps(about))
    told = fails([*export, f"--output={tmp_path / 'none'}"], capsys)
    assert "its transformer differs in model.json (shift_tokens);" in told
    assert not (tmp_path / "none").exists()
