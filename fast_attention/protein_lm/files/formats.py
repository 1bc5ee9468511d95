"""What a file is that was given for a FASTA file, and how to make one of it."""

from __future__ import annotations

import re

_PROTEINS = "Give a FASTA file, plain or compressed with gzip."
_PACKED = "This looks like {}: unpack it, and give the FASTA file{} in it."

# By the first bytes. What follows separates plain words from magic numbers.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", _PACKED.format("a zip archive or an Office document", "")),
    (b"BZh", _PACKED.format("bzip2", "")),
    (b"\xfd7zXZ\0", _PACKED.format("xz", "")),
    (b"\x28\xb5\x2f\xfd", _PACKED.format("Zstandard", "")),
    (b"7z\xbc\xaf\x27\x1c", _PACKED.format("a 7-Zip archive", "")),
    (b"Rar!\x1a\x07", _PACKED.format("a RAR archive", "")),
    (b"\x1f\x8b", "This looks like gzip inside gzip: unpack it once with gunzip."),
    (b"%PDF", "This looks like a PDF: copy the proteins to a plain text file."),
    (b"{\\rtf", "This looks like RTF: save it as plain text."),
    (b"\xd0\xcf\x11\xe0", "This looks like an Office document: save it as plain text."),
    (b"\x89HDF", "This looks like HDF5: write its proteins to a FASTA file."),
    (b"PAR1", "This looks like Parquet: write its proteins to a FASTA file."),
    (b"\x93NUMPY", "This looks like a NumPy array: write its proteins to a FASTA file."),
    (b"version https://git-lfs", "This is a pointer of Git LFS: fetch the file with git lfs pull."),
    (b"LOCUS ", "This looks like GenBank: convert it to FASTA, or download it as that."),
    (b"ID   ", "This looks like EMBL or Swiss-Prot text: convert it to FASTA."),
    (b"HEADER ", "This looks like a PDB file: convert it to FASTA, or download it as that."),
    (b"ATOM ", "This looks like a PDB file: convert it to FASTA."),
    (b"data_", "This looks like mmCIF: convert it to FASTA, or download it as that."),
    (b"# STOCKHOLM", "This looks like a Stockholm alignment: convert it to FASTA, without gaps."),
    (b"CLUSTAL", "This looks like a Clustal alignment: convert it to FASTA, without gaps."),
    (b"#NEXUS", "This looks like a NEXUS file: convert it to FASTA, without gaps."),
    (b"##gff", "This looks like GFF, which annotates sequences: give the proteins as FASTA."),
    (b";", "Comments that begin with ';' are not supported: remove them."),
)


def name_format(head: bytes) -> str:
    """Says what a file is that does not begin with ``>``, and what to do with it.

    Args:
      head: How it begins.
    """
    text = head.lstrip()
    for signature, meaning in _SIGNATURES:
        if head.startswith(signature) or text.startswith(signature):
            return meaning
    if head[257:262] == b"ustar":
        return _PACKED.format("a tar archive", "s")
    if b"\0" in head:
        return f"This is binary data with NUL bytes, not text. {_PROTEINS}"
    if re.match(rb"@[^\n]*\n[^\n]*\n\+", text):
        return "This looks like FASTQ, reads of DNA: translate them to proteins, as FASTA."
    if re.match(rb"(?i)<(!doctype|html|\?xml)", text):
        return "This looks like a web page or XML: download the FASTA file itself."
    if text[:1] in b"{[":
        return "This looks like JSON: write its proteins to a FASTA file."
    line = text.partition(b"\n")[0].strip()
    if re.search(rb"[\t,;]", line):
        return (
            "This looks like a table: with columns of ids and sequences it is read if its name "
            "ends in .csv or .tsv. Otherwise write two lines for each: '>id' and its residues."
        )
    if re.fullmatch(rb"[A-Za-z*]+", line):
        return "These may be residues without a header: put a line such as '>name' before them."
    return _PROTEINS
