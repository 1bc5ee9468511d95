import pytest

from fast_attention.protein_lm import cli, read_fasta
from fast_attention.protein_lm.inference import sampling


def fails(arguments, capsys, status=1):
    assert cli.main(arguments) == status
    return capsys.readouterr().err


def test_every_prompt_of_a_file_is_continued(lm_run, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.fasta", tmp_path / "new.fasta"
    prompts.write_text(">one\nMKT\n>two\nACD\n")
    arguments = [
        "sample",
        f"--run_dir={lm_run}",
        f"--prompt_fasta={prompts}",
        "--num_samples=2",
        "--min_length=6",
        "--max_length=12",
        "--repetition_penalty=1.2",
        "--repetition_window=4",
        f"--output={output}",
    ]
    assert cli.main(arguments) == 0
    assert "4 proteins" in capsys.readouterr().out
    records = list(read_fasta(output))
    assert [record.id for record in records] == ["one_1", "one_2", "two_1", "two_2"]
    assert [record.sequence[:3] for record in records] == ["MKT", "MKT", "ACD", "ACD"]
    assert all(6 <= len(record.sequence) <= 12 for record in records)
    assert "log_likelihood=-" in records[0].description
    assert "prompt=MKT seed=0" in records[0].description


def test_hidden_residues_are_filled_in(bert_run, tmp_path, capsys):
    hidden, output = tmp_path / "hidden.fasta", tmp_path / "filled.fasta"
    hidden.write_text(">p\nMK*AY\nI*\n")
    common = ["sample", f"--run_dir={bert_run}", f"--output={output}"]
    assert cli.main([*common, f"--infill={hidden}", "--num_samples=2", "--rounds=1"]) == 0
    one, _ = read_fasta(output)
    assert one.id == "p_1" and one.sequence[:2] + one.sequence[3:6] == "MKAYI"
    assert len(one.sequence) == 7 and "filled=2" in one.description
    assert cli.main([*common, "--infill=mk*a"]) == 0
    (one,) = read_fasta(output)
    assert one.id == "infill_1"
    long = "MKT" * 100 + "*"
    assert cli.main([*common, f"--infill={long[-60:]}"]) == 0
    assert "301 residues" in fails([*common, f"--infill={long}"], capsys)
    assert "neither a file nor residues" in fails([*common, "--infill=M-K"], capsys)
    told = fails([*common, f"--infill={'M' * 300}-"], capsys)
    assert "neither a file nor residues" in told and "'-' is none of" in told and len(told) < 400
    assert "--infill" in fails(common, capsys)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--infill=M*K", "sees only what stands before"),
        ("--prompt=MKJ", "--prompt: the prompt has 'J', which is none of the residues ACD"),
        ("--prompt=MK*", "--prompt: the prompt has '*', which is none of the residues ACD"),
        (f"--prompt={'M' * 300}", "--prompt: the prompt has 300 residues, but a protein has at"),
        ("--prompt_fasta=absent.fasta", "absent.fasta"),
    ],
)
def test_what_cannot_be_done_is_told(lm_run, tmp_path, option, expected, capsys):
    output = tmp_path / "new.fasta"
    arguments = ["sample", f"--run_dir={lm_run}", option, f"--output={output}"]
    assert expected in fails(arguments, capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.fasta", f">a\nMK\n>b\n{'M' * 300}\n", "p.fasta: 'b': the prompt has 300 residues"),
        ("p.fasta", ">a\nMK\n>a\nMKT\n", "has the id of the record at"),
        ("p.csv", f"id,sequence\na,MK\nb,{'M' * 300}\n", "p.csv: 'b': the prompt has 300"),
    ],
    ids=["long", "twice", "table"],
)
def test_all_prompts_are_checked_before_one_is_continued(
    lm_run, tmp_path, name, text, expected, capsys, monkeypatch
):
    def draw(*_, **__):
        raise AssertionError("a prompt was continued")

    monkeypatch.setattr(sampling, "draw_proteins", draw)
    (tmp_path / name).write_text(text)
    arguments = ["sample", f"--run_dir={lm_run}", f"--output={tmp_path / 'x.fasta'}"]
    assert expected in fails([*arguments, f"--prompt_fasta={tmp_path / name}"], capsys)


def test_options_of_writing_are_refused_for_filling(bert_run, tmp_path, capsys):
    arguments = [f"--run_dir={bert_run}", "--infill=M*K", "--min_length=3", "--output=x"]
    assert "--min_length has no effect" in fails(["sample", *arguments], capsys, status=2)
