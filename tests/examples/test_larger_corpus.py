import os

import pytest

from examples import larger_corpus
from fast_attention.protein_lm.data.fasta import FastaRecord, read_fasta, write_fasta

PROTEINS = {"P1|GO:1": "MKT" * 10, "P2|GO:1,GO:2": "ACD" * 10, "P3|GO:1": "WWY" * 10, "P4|": "MAC"}


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# Finds P2 from whatever it is asked, and lets P1 and a protein of the package stand for clusters.
MMSEQS = """
case "$1" in
easy-search) test -s "$2" && test -s "$3" && echo P2 > "$4";;
easy-linclust) printf ">P1\\nMKT\\n>package-7\\nMKT\\n" > "$3_rep_seq.fasta"; cp "$2" "$SEEN";;
esac
"""


@pytest.mark.parametrize(
    ("options", "kept"),
    [((), ["P1", "P3"]), (("--identity=0.3",), ["P1"])],
    ids=["all", "clusters"],
)
def test_relatives_short_ones_repeats_and_all_but_one_of_a_cluster_are_left_out(
    options, kept, tmp_path, monkeypatch, capsys
):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    text = "".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items())
    (tmp_path / "all.fasta").write_text(text)
    program(bin_folder, "blastdbcmd", f"cat {tmp_path / 'all.fasta'}")
    program(bin_folder, "mmseqs", MMSEQS)
    monkeypatch.setenv("SEEN", str(tmp_path / "clustered.fasta"))
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    for part in ("BPO", "MFO", "CCO"):
        database = tmp_path / "unpacked" / "dataset_201401" / part / "goasp.fasta.psq"
        database.parent.mkdir(parents=True)
        database.touch()
    evaluation = tmp_path / "evaluation.fasta"
    write_fasta(evaluation, [FastaRecord("E1", "", "ACD" * 10)])
    output = tmp_path / "corpus.fasta.gz"
    larger_corpus.main(
        [
            f"--databases={tmp_path / 'unpacked'}",
            f"--evaluation={evaluation}",
            f"--output={output}",
            *options,
        ]
    )
    assert [record.id for record in read_fasta(output)] == kept
    assert f"{len(kept)} proteins, {30 * len(kept)} residues" in capsys.readouterr().out
    if options:
        clustered = [record.id for record in read_fasta(tmp_path / "clustered.fasta")]
        assert clustered[:3] == ["P1", "P3", "package-0"]


def test_a_share_of_the_proteins_is_a_function_of_their_residues():
    shares = [larger_corpus._share(f"MKT{number}") for number in range(400)]
    assert 0.4 < sum(share < 0.5 for share in shares) / 400 < 0.6
