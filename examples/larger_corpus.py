"""Makes a larger training corpus: Swiss-Prot of 2014 without relatives of the evaluation proteins.

Debian ships 435,000 distinct Swiss-Prot proteins (165 million residues) as BLAST databases. Many
are relatives of the proteins that a model is evaluated on; they have to go before anybody trains on
the rest. A protein is left out when MMseqs2 finds it from an evaluation protein at its greatest
sensitivity. The search allows E-values of 0.05, because those grow with the size of the corpus: in
the bundled corpus, a 23rd of this one, the same hits would have about 0.002.

With --share=0.1 a tenth of the proteins is kept, always the same: those whose hash says so. With
--identity=0.3 one protein of each cluster is kept: MMseqs2 puts proteins into one cluster if they
have this identity and cover each other by half. A small model learns more from many families than
from many relatives.

On Debian or Ubuntu (250 MB, about 15 minutes on two cores):

    apt-get install ncbi-blast+ mmseqs2
    apt-get download metastudent-data && dpkg-deb -x metastudent-data_*.deb metastudent
    python examples/larger_corpus.py --databases metastudent --output swissprot.fasta.gz --share 0.1

Sequences: UniProt Consortium, CC BY 4.0, from Swiss-Prot of January 2014 as packed by
metastudent-data 2.0.1 (GPL as a package; nothing of it comes with this project).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fast_attention.protein_lm.data.corpus import bundled_corpus
from fast_attention.protein_lm.data.fasta import (
    FastaRecord,
    read_fasta,
    write_fasta,
)
from fast_attention.protein_lm.distributed.stopping import Interrupted, interrupt_on_signals
from fast_attention.protein_lm.files.output_files import check_outputs

_DATABASES = "dataset_201401/{}/goasp.fasta"
_SHORTEST = 20
_OF_PACKAGE = "package-"


def find_databases(folder: Path) -> list[Path]:
    """Returns the three databases, as files without their extensions.

    Args:
      folder: Where the package was unpacked.

    Raises:
      FileNotFoundError: If one is not there.
    """
    databases = []
    for part in ("BPO", "MFO", "CCO"):
        name = _DATABASES.format(part)
        found = next(folder.rglob(f"{name}.psq"), None)
        if found is None:
            raise FileNotFoundError(f"no {name}.psq below {folder}: unpack metastudent-data there")
        databases.append(found.with_suffix(""))
    return databases


def distinct_proteins(databases: Iterable[Path]) -> Iterator[FastaRecord]:
    """Reads databases; equal sequences, and those of fewer than 20 residues, go once.

    Args:
      databases: From `find_databases`.

    Raises:
      subprocess.CalledProcessError: If blastdbcmd fails.
    """
    seen: set[bytes] = set()
    for name in databases:
        with tempfile.NamedTemporaryFile("w+b", suffix=".fasta") as text:
            command = ["blastdbcmd", "-db", str(name), "-entry", "all"]
            subprocess.run(command, stdout=text, check=True)
            for record in read_fasta(text.name, on_error="replace"):
                digest = hashlib.blake2b(record.sequence.encode(), digest_size=16).digest()
                if digest in seen or len(record.sequence) < _SHORTEST:
                    continue
                seen.add(digest)
                # What follows the accession are terms of the Gene Ontology, up to thousands.
                yield FastaRecord(record.id.partition("|")[0], "", record.sequence)


def some(records: Iterator[FastaRecord]) -> Iterator[FastaRecord]:
    """Raises ValueError if there are no proteins; an output that exists stays as it is then."""
    first = next(records, None)
    if first is None:
        raise ValueError("no protein is left: raise --share, or give other --evaluation proteins")
    return itertools.chain([first], records)


def _share(sequence: str) -> float:
    """A number in [0, 1) that is a function of the sequence, and otherwise as if drawn."""
    digest = hashlib.blake2b(sequence.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def relatives(evaluation: Sequence[Path], corpus: Path, folder: Path) -> set[str]:
    """The ids in `corpus` that MMseqs2 finds from any protein of `evaluation`.

    Args:
      evaluation: FASTA files.
      corpus: FASTA file.
      folder: For temporary files.

    Raises:
      subprocess.CalledProcessError: If mmseqs fails.
    """
    queries, hits = folder / "evaluation.fasta", folder / "hits.tsv"
    write_fasta(
        queries,
        (
            FastaRecord(f"q{number}", "", record.sequence)
            for number, record in enumerate(r for path in evaluation for r in read_fasta(path))
        ),
    )
    options = "-e 0.05 -s 7.5 --max-seqs 20000 --alignment-mode 1 --format-output target"
    paths = [str(path) for path in (queries, corpus, hits, folder / "mmseqs")]
    subprocess.run(["mmseqs", "easy-search", *paths, *options.split()], check=True)
    return set(hits.read_text().split())


def representatives(corpus: Path, identity: float, folder: Path) -> set[str]:
    """The ids of the proteins in `corpus` that stand for a cluster.

    Clusters also contain the training proteins of the package, which may stand for some.

    Args:
      corpus: FASTA file.
      identity: Least share of equal residues in an alignment of two proteins of a cluster.
      folder: For temporary files.

    Raises:
      subprocess.CalledProcessError: If mmseqs fails.
    """
    everything, prefix = folder / "clustered.fasta", folder / "clusters"
    package = (
        FastaRecord(f"{_OF_PACKAGE}{number}", "", record.sequence)
        for number, record in enumerate(read_fasta(bundled_corpus("train")))
    )
    write_fasta(everything, itertools.chain(read_fasta(corpus), package))
    paths = [str(path) for path in (everything, prefix, folder / "mmseqs-clusters")]
    options = ["--min-seq-id", str(identity), "-c", "0.5", "--cov-mode", "0"]
    subprocess.run(["mmseqs", "easy-linclust", *paths, *options], check=True)
    chosen = {record.id for record in read_fasta(f"{prefix}_rep_seq.fasta")}
    return {name for name in chosen if not name.startswith(_OF_PACKAGE)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description="Makes a larger training corpus.")
    parser.add_argument("--databases", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        metavar="FASTA",
        help="whose relatives are left out; may be repeated (default: the bundled valid, test and "
        "ood_test)",
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the proteins to keep")
    parser.add_argument(
        "--identity",
        type=float,
        metavar="X",
        help="keep one protein of each cluster of at least this identity, for instance 0.3 "
        "(default: keep all)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FASTA")
    options = parser.parse_args(arguments)
    if options.identity is not None and not 0 < options.identity <= 1:
        parser.error(f"--identity must be above 0 and at most 1, got {options.identity}")
    if not 0 < options.share <= 1:
        parser.error(f"--share must be above 0 and at most 1, got {options.share}")
    for program in ("blastdbcmd", "mmseqs"):
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed: apt-get install ncbi-blast+ mmseqs2")
    try:
        # Temporary files of gigabytes are removed.
        with interrupt_on_signals():
            _make(options)
    except Interrupted as stopped:
        parser.exit(stopped.exit_status, f"{parser.prog}: {stopped}\n")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def _make(options: argparse.Namespace) -> None:
    """Makes the corpus."""
    evaluation = options.evaluation or [
        bundled_corpus(split) for split in ("valid", "test", "ood_test")
    ]
    # Relatives of these are welcome, they themselves are not.
    iid = [bundled_corpus(split) for split in ("valid_iid", "test_iid")]
    equal = {record.sequence for path in iid for record in read_fasta(path)}
    # The search takes a quarter of an hour: what can be wrong is found before.
    check_outputs({"--output": options.output}, evaluation)
    for path in evaluation:
        for _ in read_fasta(path):
            pass
    databases = find_databases(options.databases)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        everything = folder / "corpus.fasta"
        write_fasta(everything, distinct_proteins(databases))
        found = relatives(evaluation, everything, folder)
        kept = residues = 0

        def rest() -> Iterator[FastaRecord]:
            for record in read_fasta(everything):
                wanted = record.id not in found and record.sequence not in equal
                if wanted and _share(record.sequence) < options.share:
                    yield record

        selected = rest()
        if options.identity is not None:
            remaining = folder / "rest.fasta"
            write_fasta(remaining, some(selected))
            chosen = representatives(remaining, options.identity, folder)
            selected = (record for record in read_fasta(remaining) if record.id in chosen)

        def counted() -> Iterator[FastaRecord]:
            nonlocal kept, residues
            for record in selected:
                kept, residues = kept + 1, residues + len(record.sequence)
                yield record

        write_fasta(options.output, some(counted()))
    print(f"{kept:,} proteins, {residues:,} residues written to {options.output}")
    print(f"{len(found):,} relatives of the evaluation proteins left out")


if __name__ == "__main__":
    main()
