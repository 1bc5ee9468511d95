import csv
import json

import pytest

from fast_attention.protein_lm import cli, read_fasta
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation import groups


def test_tables_are_written(lm_run, tiny_fasta, tmp_path, capsys):
    ids = [record.id for record in read_fasta(tiny_fasta)]
    families, table, output = (tmp_path / name for name in ("f.tsv", "each.tsv", "out.json"))
    families.write_text("id\tfamily\n" + "".join(f"{i}\t{n % 30}\n" for n, i in enumerate(ids)))
    files = [f"--families={families}", f"--per_protein={table}", f"--output={output}"]
    assert cli.main(["evaluate", f"--run_dir={lm_run}", f"--fasta={tiny_fasta}", *files]) == 0
    told = capsys.readouterr().out
    assert "+-" in told and "500 proteins" in told and str(table) in told and "10 more" in told
    rows = list(csv.DictReader(table.read_text().splitlines(), delimiter="\t"))
    assert [row["id"] for row in rows] == ids
    result = json.loads(output.read_text())
    assert sum(int(row["residues_scored"]) for row in rows) == result["residues"]
    assert len(result["by_family"]) == 30
    assert {"perplexity", "accuracy", "5-gram_perplexity", "family"} < set(rows[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,family\na,x\na,y\n", "line 3: 'a' is also in line 2"),
        ("id,family\na,\n", "line 2: the family is empty"),
        ('id,family\n\na,"x\ny"\n', "line 4: the family .* control character"),
        ("a,x\nb,y\n", "1 of 1 protein not found in its column 'a'.*first line must name"),
    ],
    ids=["twice", "empty", "line_end", "no_header"],
)
def test_families_that_cannot_be_looked_up_are_told_with_their_line(tmp_path, text, message):
    path = tmp_path / "families.csv"
    path.write_text(text)
    with pytest.raises(RunError, match=rf"families\.csv.* {message}"):
        groups.read_groups(path, ["a"], key=None, value=None, name="family")


def test_an_unfit_table_is_told(lm_run, tiny_fasta, tmp_path, capsys):
    table = tmp_path / "table.tsv"
    table.write_text("accession\tsplit\nP1\ttest\n")
    arguments = ["evaluate", f"--run_dir={lm_run}", f"--fasta={tiny_fasta}"]
    assert cli.main([*arguments, f"--split_file={table}"]) == 1
    assert "no column 'component'" in capsys.readouterr().err
    assert not (lm_run / "evaluation.json").exists()


def test_a_run_that_cannot_be_written_asks_for_another_output(lm_run, tiny_fasta, capsys):
    (lm_run / "evaluation.json").mkdir()
    try:
        assert cli.main(["evaluate", f"--run_dir={lm_run}", f"--fasta={tiny_fasta}"]) == 1
    finally:
        (lm_run / "evaluation.json").rmdir()
    assert capsys.readouterr().err.rstrip().endswith("with --output=FILE")
