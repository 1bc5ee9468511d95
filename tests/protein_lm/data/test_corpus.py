import gzip
import hashlib
import re
import tracemalloc

import numpy as np
import pytest

from fast_attention.protein_lm.data.corpus import (
    BUNDLED_SPLITS,
    bundled_corpus,
    bundled_splits,
    load_corpus,
)
from fast_attention.protein_lm.data.domains import (
    FixedLengthDiscreteDomain,
    VariableLengthDiscreteDomain,
    make_protein_domain,
)
from fast_attention.protein_lm.data.fasta import (
    FastaError,
    FastaRecord,
    read_fasta,
    write_fasta,
)
from fast_attention.protein_lm.data.vocabulary import ProteinVocab, Vocabulary

DOMAIN = make_protein_domain()


def fasta(path, *sequences):
    write_fasta(path, [FastaRecord(f"p{i}", "", s) for i, s in enumerate(sequences)])
    return path


def proteins(corpus):
    return [
        corpus.tokens[a:b].tolist()
        for a, b in np.lib.stride_tricks.sliding_window_view(corpus.offsets, 2)
    ]


def test_files_are_joined_in_order_and_proteins_end_with_eos(tmp_path):
    paths = [fasta(tmp_path / "a", "MKT", "WYW"), fasta(tmp_path / "b.gz", "ACDEF")]
    corpus = load_corpus(paths, DOMAIN)
    eos = DOMAIN.vocab.eos
    expected = [DOMAIN.vocab.encode(s) + [eos] for s in ("MKT", "WYW", "ACDEF")]
    assert proteins(corpus) == expected
    assert corpus.tokens.dtype == np.uint8
    assert len(corpus) == 3
    np.testing.assert_array_equal(corpus.lengths, [4, 4, 6])


def test_without_an_end_token_none_is_added(tmp_path):
    domain = FixedLengthDiscreteDomain(vocab=ProteinVocab(), length=3)
    assert proteins(load_corpus(fasta(tmp_path / "a", "MKT"), domain)) == [[10, 8, 16]]


def test_what_the_vocabulary_lacks_is_an_error_or_unknown(tmp_path):
    path = fasta(tmp_path / "a.fasta", "MJK")
    with pytest.raises(FastaError, match=r"a\.fasta, line 2: record 'p0'.*'J'"):
        load_corpus(path, DOMAIN)
    corpus = load_corpus(path, DOMAIN, on_error="replace")
    assert DOMAIN.vocab.decode(corpus.tokens) == "MXK>"
    standard = make_protein_domain(include_anomalous_amino_acids=False)
    with pytest.raises(FastaError, match="'X'"):
        load_corpus(fasta(tmp_path / "b", "MXK"), standard)


def test_a_list_of_no_files_and_a_symbol_of_another_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one FASTA file"):
        load_corpus([], DOMAIN)
    large = VariableLengthDiscreteDomain(Vocabulary(300, include_eos=True), 8)
    with pytest.raises(ValueError, match="symbol 'M', which is none of the residues 0123456789"):
        load_corpus(fasta(tmp_path / "a", "MK"), large)


def test_the_bundled_files_are_those_of_their_readme():
    folder = bundled_corpus("train").parent
    readme = (folder / "README.md").read_text()
    sums = dict(re.findall(r"^(\w{64})  (\S+)$", readme, re.M))
    files = {path.name: path for path in folder.glob("*.gz")}
    expected = {"splits.tsv.gz", *(f"{split}.fasta.gz" for split in BUNDLED_SPLITS)}
    assert expected == set(files) == set(sums.values())
    for digest, name in sums.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    assert sum(path.stat().st_size for path in files.values()) < 10e6
    for word in ("CC BY 4.0", "UniProt Consortium", "MMseqs2"):
        assert word in readme


@pytest.mark.parametrize("split", BUNDLED_SPLITS)
def test_the_bundled_counts_are_those_of_their_readme(split):
    readme = (bundled_corpus("train").parent / "README.md").read_text()
    rows = re.findall(rf"^\| `{split}\.fasta\.gz` \| ([\d,]+) \| ([\d,]+) ", readme, re.M)
    number, residues = (int(count.replace(",", "")) for count in rows[0])
    corpus = load_corpus(bundled_corpus(split), DOMAIN)
    assert (len(corpus), len(corpus.tokens) - len(corpus)) == (number, residues)


def test_no_protein_is_in_two_splits_and_tiny_is_part_of_train():
    sequences = {
        split: {record.sequence for record in read_fasta(bundled_corpus(split))}
        for split in BUNDLED_SPLITS
    }
    assert sequences["tiny"] <= sequences["train"]
    assert not sequences["train"] & (sequences["valid"] | sequences["test"])
    held_out = [sequences[split] for split in BUNDLED_SPLITS if split not in ("train", "tiny")]
    assert len(set().union(*held_out)) == sum(map(len, held_out))


def test_the_table_of_splits_knows_every_bundled_protein():
    with gzip.open(bundled_splits(), "rt") as table:
        rows = [line.split("\t")[:2] for line in table]
    assert rows[0] == ["accession", "split"]
    split_of = dict(rows[1:])
    for split in BUNDLED_SPLITS:
        records = read_fasta(bundled_corpus(split))
        found = {split_of[record.id.split("|")[1]] for record in records}
        assert found == {"train" if split == "tiny" else split}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, valid, test, ood_test"):
        bundled_corpus("dev")


def test_a_corpus_takes_a_byte_per_residue(tmp_path):
    """Also while it is read, so that large files can be trained on."""
    with open(tmp_path / "many.fasta", "w") as file:
        for number in range(3000):
            file.write(f">p{number}\n{'ACDEFGHIKLMNPQRSTVWY' * 20}\n")
    tracemalloc.start()
    corpus = load_corpus(tmp_path / "many.fasta", DOMAIN)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.tokens) == 3000 * 401
    # A little more while the file passes through, whatever its size.
    assert peak < 1.4 * len(corpus.tokens) + 2**20
