import csv

import matplotlib.image
import numpy as np
import pytest

from fast_attention.protein_lm import cli
from fast_attention.protein_lm.data.domains import VariableLengthDiscreteDomain
from fast_attention.protein_lm.data.vocabulary import ProteinVocab, Vocabulary
from fast_attention.protein_lm.inference import effect_files, mutation_effects
from fast_attention.protein_lm.inference.heatmap import effect_matrix
from fast_attention.protein_lm.inference.mutation_effects import score_variants
from fast_attention.protein_lm.inference.mutations import parse_variant
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.models import FlaxLM

WILD = "MKTAYIAKQR"


def mutate(run, output, *arguments):
    return cli.main(["mutate", f"--run_dir={run}", f"--output={output}", *arguments])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def fails(run, tmp_path, capsys, *arguments, status=1):
    assert mutate(run, tmp_path / "x.tsv", *arguments) == status
    assert not (tmp_path / "x.tsv").exists()
    return capsys.readouterr().err


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "wild.fasta"
    path.write_text(f">one\n{WILD}\n>two\nACDEF\n")
    return path


def test_all_substitutions_and_their_picture(lm_run, tmp_path, capsys):
    output, picture = tmp_path / "effects.tsv", tmp_path / "effects.png"
    arguments = [f"--sequence={WILD}", "--all", "--positions=2-3,10", f"--heatmap={picture}"]
    assert mutate(lm_run, output, *arguments) == 0
    assert "57 mutants of 1 protein " in capsys.readouterr().out
    found = rows(output)
    assert list(found[0]) == [
        "id",
        "mutant",
        "log_likelihood_ratio",
        "log_likelihood_ratio_with_end",
    ]
    assert [row["mutant"] for row in found[:2]] == ["K2A", "K2C"] and len(found) == 57
    variant = parse_variant("K2C", WILD)
    (value,) = score_variants(load_run(lm_run).model, WILD, [variant])["log_likelihood_ratio"]
    assert float(found[1]["log_likelihood_ratio"]) == pytest.approx(value, abs=1e-4)
    assert matplotlib.image.imread(picture).ndim == 3


def test_a_table_of_mutations_of_several_proteins(bert_run, fasta, tmp_path):
    table, output = tmp_path / "list.csv", tmp_path / "effects.tsv"
    table.write_text('DMS_score,id,mutant\n0.5,two,A1C\n0.1,one,"K2G,T3W"\n0.2,two,C2C\n')
    assert mutate(bert_run, output, f"--fasta={fasta}", f"--mutations={table}") == 0
    found = rows(output)
    assert [(row["id"], row["mutant"]) for row in found] == [
        ("two", "A1C"),
        ("two", "C2C"),
        ("one", "K2G,T3W"),
    ]
    assert float(found[1]["masked_marginal"]) == 0 != float(found[2]["masked_marginal"])
    arguments = [f"--fasta={fasta}", f"--mutations={table}", "--method=wt-marginals"]
    assert mutate(bert_run, output, *arguments) == 0
    assert list(rows(output)[0]) == ["id", "mutant", "wt_marginal"]


def test_a_list_and_whole_proteins_say_the_same(lm_run, tmp_path):
    listed, whole, output = (tmp_path / name for name in ("list.txt", "v.fasta", "out.tsv"))
    listed.write_text("K2G\n\nK2del\nR10W:M1V\n")
    whole.write_text(">a\nMGTAYIAKQR\n>b\nMTAYIAKQR\n>c\nVKTAYIAKQW\n")
    values = []
    for argument in (f"--mutations={listed}", f"--variants={whole}"):
        assert mutate(lm_run, output, f"--sequence={WILD}", argument) == 0
        values.append([float(row["log_likelihood_ratio"]) for row in rows(output)])
    np.testing.assert_array_equal(*values)
    assert [row["mutant"] for row in rows(output)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("K2G\nA2G\n", "line 2: A2G: the wild type has K at position 2, and not A"),
        ("mutant\tid\nK2G\tthree\n", "line 2: there is no wild type 'three'; there is protein"),
        ("mutant,x\n,1\n", "line 2: nothing in the column 'mutant'"),
        ("mutant\n", "no mutation"),
        ("mutant,x\nK2G,R10W,1\n", "line 2: has 3 cells, but the first line has 2"),
        ("mutant,x\nK2G\n", "line 2: has 1 cell, but the first line has 2"),
        ("mutant,mutant\nK2G,R10W\n", "2 columns are named 'mutant'"),
        ('mutant,x\nK2G,"a\nR10W,b\n', "line 2: is not a valid table"),
        ("mutant,x\nK2G,\0\n", "line 2: has a NUL byte"),
        (" \n", "the file is empty"),
        ("hello\n", "line 1: 'hello' is not a valid mutation"),
    ],
    ids=ascii,
)
def test_a_bad_list_is_told_with_its_line(lm_run, tmp_path, capsys, text, expected):
    path = tmp_path / "list.txt"
    path.write_text(text)
    told = fails(lm_run, tmp_path, capsys, f"--sequence={WILD}", f"--mutations={path}")
    assert expected in told and str(path) in told


def test_mutations_may_be_given_in_place_of_a_file(lm_run, tmp_path):
    listed, output = tmp_path / "list.txt", tmp_path / "out.tsv"
    listed.write_text("K2G\nK2del\nR10W:M1V\n")
    found = []
    for mutations in (listed, "K2G, K2del,R10W:M1V"):
        assert mutate(lm_run, output, f"--sequence={WILD}", f"--mutations={mutations}") == 0
        found.append(rows(output))
    assert found[0] == found[1] and [row["mutant"] for row in found[1]][2] == "R10W:M1V"


@pytest.mark.parametrize(
    ("mutations", "expected"),
    [
        ("absent.tsv", "neither a file nor mutations: there is no such file, and 'absent.tsv'"),
        ("K2G,hello", "'hello' is not a mutation; check the path, or give mutations such as A12G"),
        ("A2G", "--mutations=A2G: A2G: the wild type has K at position 2, and not A"),
        ("K" * 300, "neither a file nor mutations"),
        ("K2G,", "'' is not a mutation"),
    ],
    ids=["absent", "word", "misfit", "long", "comma"],
)
def test_what_is_neither_a_file_nor_a_mutation_is_told(
    lm_run, tmp_path, capsys, mutations, expected
):
    told = fails(lm_run, tmp_path, capsys, f"--sequence={WILD}", f"--mutations={mutations}")
    assert expected in told


def test_mutants_are_scored_in_groups(lm_run, tmp_path, monkeypatch):
    whole, output = tmp_path / "whole.tsv", tmp_path / "out.tsv"
    assert mutate(lm_run, whole, f"--sequence={WILD}", "--all") == 0
    groups, score = [], mutation_effects.score_variants

    def count(model, wild_type, variants, **options):
        groups.append(len(variants))
        return score(model, wild_type, variants, **options)

    monkeypatch.setattr(mutation_effects, "score_variants", count)
    monkeypatch.setattr(effect_files, "_MOST_EDITS", 60)
    arguments = [f"--sequence={WILD}", "--all", f"--heatmap={tmp_path / 'x.png'}"]
    assert mutate(lm_run, output, *arguments) == 0
    assert sum(groups) == 190 and max(groups) == 30
    one, two = rows(whole), rows(output)
    assert [row["mutant"] for row in one] == [row["mutant"] for row in two]
    values = [[float(row["log_likelihood_ratio"]) for row in found] for found in (one, two)]
    np.testing.assert_allclose(*values, atol=1e-4)


def test_a_stopped_command_resumes(lm_run, tmp_path, monkeypatch, capsys):
    whole, output = tmp_path / "whole.tsv", tmp_path / "out.tsv"
    pictures = [tmp_path / "whole.png", tmp_path / "out.png"]
    monkeypatch.setattr(effect_files, "_MOST_EDITS", 60)
    arguments = [f"--sequence={WILD}", "--all"]
    assert mutate(lm_run, whole, *arguments, f"--heatmap={pictures[0]}") == 0
    score, groups = mutation_effects.score_variants, []

    def stop(model, wild_type, variants, **options):
        if len(groups) == 2:
            raise KeyboardInterrupt
        groups.append(len(variants))
        return score(model, wild_type, variants, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mutation_effects, "score_variants", stop)
        assert mutate(lm_run, output, *arguments) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert not output.exists()
    assert mutate(lm_run, output, *arguments, "--tokens_per_batch=100") == 1
    assert "tokens_per_batch: 16384 there, 100 asked for now" in capsys.readouterr().err
    assert mutate(lm_run, output, *arguments, f"--heatmap={pictures[1]}") == 0
    assert f"{sum(groups)} mutants of these had been scored" in capsys.readouterr().out
    assert output.read_bytes() == whole.read_bytes()
    assert pictures[1].read_bytes() == pictures[0].read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_genome_is_refused_by_its_name(lm_run, tmp_path, capsys):
    fasta = tmp_path / "genome.fasta"
    fasta.write_text(">NC_1\n" + "ACGT" * 20_000 + "\n")
    told = fails(lm_run, tmp_path, capsys, f"--fasta={fasta}", "--all")
    assert "'NC_1' has more than 50,000 residues" in told and "genome" in told


def test_what_cannot_be_done_is_told(lm_run, bert_run, fasta, tmp_path, capsys):
    path = tmp_path / "list.txt"
    path.write_text("K2del\n")
    common = [f"--sequence={WILD}", f"--mutations={path}"]
    assert "use a run of FlaxLM" in fails(bert_run, tmp_path, capsys, *common)
    told = fails(lm_run, tmp_path, capsys, *common, "--method=masked-marginals")
    assert "use a run with the objective masked" in told
    assert "--all" in fails(lm_run, tmp_path, capsys, *common, "--positions=1-2", status=2)
    picture = f"--heatmap={tmp_path / 'x.png'}"
    assert "single substitutions" in fails(lm_run, tmp_path, capsys, *common, picture)
    several = f"--fasta={fasta}"
    assert "column 'id'" in fails(lm_run, tmp_path, capsys, several, common[1])
    assert "one protein" in fails(lm_run, tmp_path, capsys, several, "--all", picture)
    assert "one wild type" in fails(lm_run, tmp_path, capsys, several, f"--variants={fasta}")
    assert "1-10" in fails(lm_run, tmp_path, capsys, common[0], "--all", "--positions=11")
    assert mutate(lm_run, tmp_path / "x.txt", common[0], "--all") == 1
    assert ".parquet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("vocab", "wild", "others"),
    [
        (ProteinVocab(include_align_tokens=True, include_eos=True), "M-K", "ACDEFGHIKLMNPQRSTVWY"),
        (Vocabulary("ACGU-", include_eos=True), "A-GU", "ACGU-"),
    ],
    ids=["aligned", "nucleotides"],
)
def test_mutations_are_those_of_the_alphabet_of_the_run(tmp_path, capsys, vocab, wild, others):
    domain = VariableLengthDiscreteDomain(vocab, 16)
    sizes = {"emb_dim": 8, "num_heads": 1, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8}
    run, output = tmp_path / "run", tmp_path / "out.tsv"
    FlaxLM(domain, **sizes).save(run)
    fasta, picture = tmp_path / "wild.fasta", tmp_path / "x.png"
    fasta.write_text(f">w\n{wild}\n")
    assert mutate(run, output, f"--fasta={fasta}", "--all", f"--heatmap={picture}") == 0
    expected = [
        f"{old}{place}{new}" for place, old in enumerate(wild, 1) for new in others if new != old
    ]
    assert [row["mutant"] for row in rows(output)] == expected
    assert mutate(run, output, f"--sequence={wild}", f"--mutations=-2A,{wild[0]}1-") == 0
    assert [row["mutant"] for row in rows(output)] == ["-2A", f"{wild[0]}1-"]
    assert mutate(run, output, f"--fasta={fasta}", f"--variants={fasta}") == 0
    fasta.write_text(">w\nMKO\n")
    assert "has the symbol" in fails(run, tmp_path, capsys, f"--fasta={fasta}", "--all")


def test_the_matrix_holds_single_substitutions():
    texts = ["K2G", "K2A", "M1C:K2W", "T3del", "A4X"]
    found = [parse_variant(text, WILD) for text in texts]
    matrix = effect_matrix(WILD, found, np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    letters = "ACDEFGHIKLMNPQRSTVWY"
    expected = np.full((20, 10), np.nan)
    expected[letters.index("G"), 1], expected[letters.index("A"), 1] = 1, 2
    expected[letters.index("K"), 1] = 0
    np.testing.assert_array_equal(matrix, expected)
