"""What FASTA readers meet: a name, the bytes, and the one documented behaviour of each.

The behaviour is a list of ``(id, sequence)`` where the input is understood, ``Record(regex)`` where
one record is at fault (and can be left out), or ``File(regex)`` where the file as a whole is.
Expressions begin behind the file's name.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np


class Record(NamedTuple):
    regex: str


class File(NamedTuple):
    regex: str


GOOD = b">one first\nMKT\nAYI\n>two\nACDE\n"
RECORDS = [("one", "MKTAYI"), ("two", "ACDE")]
GZIP = gzip.compress(GOOD)
# Two records stay where one is left out.
BAD = b">one\nMKT\n>bad\nMK%sT\n>two\nACDE\n"


def _bad(symbol: bytes) -> bytes:
    return BAD % symbol


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.fasta"))
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.fasta", GOOD)
    return file.getvalue()


UNDERSTOOD = {
    "plain": GOOD,
    "lower_case": b">one\nmktAYI\n>two\nacde\n",
    "crlf": GOOD.replace(b"\n", b"\r\n"),
    "old_macintosh": GOOD.replace(b"\n", b"\r"),
    "mixed_line_ends": b">one\r\nMKT\rAYI\n>two\rACDE\r\n",
    "no_last_line_end": GOOD[:-1],
    "byte_order_mark": b"\xef\xbb\xbf" + GOOD,
    "byte_order_mark_and_crlf": b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n"),
    "utf_16": GOOD.decode().encode("utf-16"),
    "utf_16_big_endian": b"\xfe\xff" + GOOD.decode().encode("utf-16-be"),
    "utf_16_and_crlf": GOOD.decode().replace("\n", "\r\n").encode("utf-16"),
    "utf_32": GOOD.decode().encode("utf-32"),
    "utf_16_in_gzip": gzip.compress(GOOD.decode().encode("utf-16")),
    "blank_lines": b"\n \n" + GOOD.replace(b"\n", b"\n\n"),
    "blanks_in_sequences": b">one\nM KT\n A\tYI \n>two\nAC DE\f\v\n",
    "stop_at_the_end": b">one\nMKTAYI*\n>two\nACDE\n*\n",
    "blanks_around_a_stop": b">one\nMKTAYI *\n \n>two\nACDE\n",
    "blanks_before_ids": b"> one\nMKTAYI\n>\ttwo\nACDE\n",
    "controls_after_ids": b">one\x01more\nMKTAYI\n>two\x1b[31m\nACDE\n",
    "strange_bytes_in_headers": b">one M\xfcller \xff\xfe\nMKTAYI\n>two\nACDE\n",
    "signs_in_headers": b">one > ; # *-\nMKTAYI\n>two =1+1\nACDE\n",
    "long_header": b">one " + b"x" * 300_000 + b"\nMKTAYI\n>two\nACDE\n",
    "gzip": GZIP,
    "gzip_members": gzip.compress(GOOD[:20]) + gzip.compress(GOOD[20:]),
    "gzip_members_of_nothing": gzip.compress(b"") + GZIP + gzip.compress(b""),
    "gzip_filled_up_with_zeros": GZIP + bytes(512),
}

CASES = {name: (content, RECORDS) for name, content in UNDERSTOOD.items()} | {
    "one_residue": (b">a\nM", [("a", "M")]),
    "many_residues": (b">a\n" + b"MKTAY" * 20_000, [("a", "MKTAY" * 20_000)]),
    "anomalous_residues": (b">a\nBOUXZ\n", [("a", "BOUXZ")]),
    "equal_ids": (b">a\nMK\n>a\nMT\n>a\nMK\n", [("a", "MK"), ("a", "MT"), ("a", "MK")]),
    "no_id": (b">\nMK\n", [("", "MK")]),
    "id_that_is_a_path": (b">../../etc/passwd\nMK\n", [("../../etc/passwd", "MK")]),
    "id_that_is_a_formula": (b">=cmd()|'/C_calc'!A0\nMK\n", [("=cmd()|'/C_calc'!A0", "MK")]),
    "id_before_a_tab": (b">a\tb\nMK\n", [("a", "MK")]),
    "id_of_many_alphabets": (">Müller_蛋白\nMK\n".encode(), [("Müller_蛋白", "MK")]),
    "gap": (_bad(b"-"), Record(r", line 4: record 'bad' has the symbol '-'.*gaps")),
    "gap_as_a_dot": (_bad(b"."), Record(r", line 4: record 'bad' has the symbol '\.'.*gaps")),
    "gap_as_a_tilde": (_bad(b"~"), Record(r", line 4: .*'~'.*Remove it")),
    "stop_inside": (_bad(b"*"), Record(r", line 4: .*'\*'.*cut the sequence")),
    "stop_inside_on_a_line_end": (_bad(b"*\n"), Record(r", line 4: .*'\*'.*cut the sequence")),
    "two_stops": (b">one\nMKT\n>bad\nMK**\n", Record(r", line 4: .*'\*'")),
    "stop_then_gap": (_bad(b"*-"), Record(r", line 4: .*'\*'")),
    "genbank_digits": (
        b">one\nMKT\n>bad\n        1 mktayiakqr qistvksf\n       61 mkt\n",
        Record(r", line 4: .*'1'.*Remove it"),
    ),
    "unknown_letter": (_bad(b"J"), Record(r", line 4: .*'J'.*on_error='replace'")),
    "unknown_small_letter": (_bad(b"j"), Record(r", line 4: .*'j'.*on_error='replace'")),
    "question_mark": (_bad(b"?"), Record(r", line 4: .*'\?'")),
    "comment": (_bad(b"\n;comment\n"), Record(r", line 5: .*';'")),
    "foreign_letter": (_bad("ß".encode()), Record(r", line 4: .*'ß'")),
    "latin_1_letter": (_bad(b"\xdf"), Record(r", line 4: .*symbol '.'")),
    "blank_that_does_not_break": (_bad("\xa0".encode()), Record(r", line 4: .*'\\xa0'")),
    "control": (_bad(b"\x1b"), Record(r", line 4: .*'\\x1b'")),
    "missing_line_end": (b">one\nMKT\n>bad\nMKT>two\nACDE\n", Record(r", line 4: .*'>'.*begin a")),
    "mark_of_a_joined_file": (
        b">bad\nMKT\n\xef\xbb\xbf>two\nACDE\n>three\nMK\n",
        Record(r", line 3: .*byte order mark"),
    ),
    "no_residues": (b">one\nMKT\n>bad\n>two\nACDE\n", Record(r", line 3: .*'bad' has no residues")),
    "no_residues_at_the_end": (b">one\nMKT\n>bad", Record(r", line 3: .*'bad' has no residues")),
    "blanks_for_residues": (b">bad\n \n\n>one\nMKT\n", Record(r", line 1: .*no residues")),
    "only_a_stop": (b">one\nMKT\n>bad\n*\n", Record(r", line 3: .*'bad' has no residues")),
    "endless_header": (
        b">one\nMKT\n>bad " + b"x" * 1_000_000 + b"\nMKT\n",
        Record(r", line 3: record 'bad' has a header of more than 1000000 bytes. Shorten"),
    ),
    "endless_id": (
        b">one\nMKT\n>" + b"x" * 2_000_000,
        Record(r", line 3: record 'x{100,200}' has"),
    ),
    "only_bad": (b">a\nM-\n>b\n\n>c\nM1\n", Record(r", line 2: record 'a'")),
    "empty": (b"", File(": the file is empty. Give")),
    "blank": (b"\n \r\n", File(": the file is empty")),
    "only_a_mark": (b"\xef\xbb\xbf", File(": the file is empty")),
    "gzip_of_nothing": (gzip.compress(b""), File(": the file is empty")),
    "no_header": (b"\nMKTAYI\nMKT\n", File(r", line 2: expected a header.*'MKTAYI'.*'>name'")),
    "residues_before_the_header": (b"MKT\n" + GOOD, File(", line 1: expected a header")),
    "blank_before_the_mark": (b" " + GOOD, File(r", line 1: expected a header.*'>one first'")),
    "table_with_commas": (b"id,sequence\na,MKT\n", File(", line 1: .*'id,sequence'.*a table")),
    "table_with_tabs": (b"id\tsequence\na\tMKT\n", File(", line 1: .*a table")),
    "fastq": (b"@read/1\nACGT\n+\nFFFF\n", File(", line 1: .*FASTQ")),
    "genbank": (b"LOCUS       AB000001\n", File(", line 1: .*GenBank")),
    "swiss_prot": (b"ID   A_HUMAN  Reviewed;\n", File(", line 1: .*Swiss-Prot")),
    "pdb": (b"HEADER    HYDROLASE\n", File(", line 1: .*PDB")),
    "mmcif": (b"data_1ABC\n#\n", File(", line 1: .*mmCIF")),
    "stockholm": (b"# STOCKHOLM 1.0\n", File(", line 1: .*Stockholm")),
    "clustal": (b"CLUSTAL W (1.8)\n", File(", line 1: .*Clustal")),
    "json": (b'{"id": "MKT"}', File(", line 1: .*JSON")),
    "web_page": (b"<!DOCTYPE html>\n<html>", File(", line 1: .*web page")),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\n", File(", line 1: .*PDF")),
    "rich_text": (rb"{\rtf1\ansi >one}", File(", line 1: .*RTF")),
    "office": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), File(", line 1: .*Office")),
    "zip": (_zip(), File(", line 1: .*zip archive.*unpack")),
    "bzip2": (bz2.compress(GOOD), File(", line 1: .*bzip2: unpack")),
    "xz": (lzma.compress(GOOD), File(", line 1: .*xz: unpack")),
    "zstandard": (b"\x28\xb5\x2f\xfd\x04\x00", File(", line 1: .*Zstandard: unpack")),
    "tar": (_tar(), File(", line 1: .*tar archive")),
    "tar_in_gzip": (gzip.compress(_tar()), File(", line 1: .*tar archive")),
    "gzip_in_gzip": (gzip.compress(GZIP), File(", line 1: .*gzip inside gzip")),
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\n", File(", line 1: .*git lfs pull")),
    "semicolon_header": (b";old style\nMKT\n", File(", line 1: .*';' are not supported")),
    "binary_noise": (np.random.default_rng(0).bytes(4096), File(", line 1: .*")),
    "zeros": (bytes(4096), File(", line 1: .*NUL")),
    "zeros_in_gzip": (gzip.compress(bytes(4096)), File(", line 1: .*NUL")),
    "nul_in_a_sequence": (_bad(b"\0"), File(", line 4: has a NUL byte.*UTF-8")),
    "nul_in_a_header": (b">one\nMKT\n>t\0o\nMKT\n", File(", line 3: has a NUL byte")),
    "nul_after_a_bad_symbol": (_bad(b"-\nMK\0"), File(", line 5: has a NUL byte")),
    "utf_16_without_a_mark": (
        GOOD.decode().encode("utf-16-le"),
        File(", line 1: has a NUL byte.*UTF-16"),
    ),
    "utf_16_cut_off": (GOOD.decode().encode("utf-16")[:-1], File(": begins as UTF-16.*damaged")),
    "utf_16_damaged": (b"\xff\xfe\0\xd8>\0", File(": begins as UTF-16.*damaged")),
    "almost_gzip": (b"\x1f\x8c" + GOOD, File(", line 1: expected a header")),
    "gzip_without_its_end": (GZIP[:-9], File(": the compressed data is cut off.*Fetch")),
    "gzip_of_a_few_bytes": (GZIP[:12], File(": the compressed data is cut off")),
    "gzip_without_its_head": (GZIP[:2], File(": the compressed data is cut off")),
    "gzip_of_another_method": (b"\x1f\x8b\x07" + GZIP[3:], File(": the compressed data .*damaged")),
    "gzip_with_another_sum": (GZIP[:-6] + b"garble", File(": the compressed data .*damaged")),
    "gzip_and_more": (GZIP + b"garble", File(": the compressed data .*damaged")),
    "gzip_garbled": (GZIP[:12] + b"\xff" * 40, File(": the compressed data .*damaged")),
    "gzip_member_cut_off": (GZIP + GZIP[:-4], File(": the compressed data is cut off")),
}
