import pytest

from fast_attention.protein_lm.inference.mutations import (
    all_substitutions,
    parse_positions,
    parse_variant,
    variant_of,
)

WILD = "MKTAYIAKQR"


@pytest.mark.parametrize(
    ("text", "sequence"),
    [
        ("K2G", "MGTAYIAKQR"),
        ("k2g", "MGTAYIAKQR"),
        (" R10M ", "MKTAYIAKQM"),
        ("K2G:R10M", "MGTAYIAKQM"),
        ("R10M,K2G", "MGTAYIAKQM"),
        ("A4A", WILD),
        ("WT", WILD),
        ("K2del", "MTAYIAKQR"),
        ("del2", "MTAYIAKQR"),
        ("K2_A4del", "MYIAKQR"),
        ("del2_4", "MYIAKQR"),
        ("K2_T3insGS", "MKGSTAYIAKQR"),
        ("K2delinsGS", "MGSTAYIAKQR"),
        ("K2_A4delinsW", "MWYIAKQR"),
        ("M1G:K2_T3insGS:R10del", "GKGSTAYIAKQ"),
    ],
)
def test_mutations_make_the_protein_they_say(text, sequence):
    variant = parse_variant(text, WILD)
    assert variant.apply(WILD) == sequence
    assert variant.growth == len(sequence) - len(WILD)
    assert variant.name == text.strip()
    assert variant.substitutes_only == (len(sequence) == len(WILD))
    assert variant_of("x", sequence, WILD).apply(WILD) == sequence


def test_what_changes_nothing_is_no_edit():
    assert parse_variant("A4A", WILD).edits == ()
    assert parse_variant("A4A:K2G", WILD).substitutions == [(1, "G")]
    assert parse_variant("K2_A4delinsKTW", WILD).substitutions == [(3, "W")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A2G", "A2G: the wild type has K at position 2, and not A"),
        ("K2G:A3G", "K2G:A3G: A3G: the wild type has T at position 3"),
        ("K20G", "no position 20; it has 10 residues"),
        ("K0G", "no position 0"),
        ("K2G:K2W", "position 2 is changed twice"),
        ("K2_A4del:T3G", "position 3 is changed twice"),
        ("K2_A4insGS", "between two neighbours"),
        ("K2insGS", "between two neighbours"),
        ("K2_T3ins", "the new residues"),
        ("K2delGS", "'delins' before them"),
        ("A4_K2del", "does not come after 4"),
        ("del1_10", "deletes the whole protein"),
        ("2G", "'2G' is not a valid mutation; expected one such as A12G"),
        ("", "not a valid mutation"),
        ("Lys2Gly", "not a valid mutation"),
    ],
)
def test_what_does_not_fit_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_variant(text, WILD)


def test_residues_of_other_alphabets_are_written_as_they_are():
    assert parse_variant("-2A", "M-K").apply("M-K") == "MAK"
    assert parse_variant("K3.:M1-", "M-K").apply("M-K") == "--."
    assert parse_variant("-2_K3ins-A", "M-K").apply("M-K") == "M--AK"
    names = [variant.name for variant in all_substitutions("A-", residues="AC-")]
    assert names == ["A1C", "A1-", "-2A", "-2C"]


def test_all_substitutions_are_all_of_them():
    found = all_substitutions("MXK")
    assert len(found) == 19 + 20 + 19
    assert len({variant.apply("MXK") for variant in found}) == len(found)
    assert found[0].name == "M1A" and found[-1].name == "K3Y"
    assert {variant.name[1] for variant in all_substitutions("MXK", [2])} == {"3"}


def test_positions_are_read():
    assert parse_positions("10-12, 3,11", 12) == [2, 9, 10, 11]
    for text in ("3-2", "0", "13", "a", "1-", ""):
        with pytest.raises(ValueError, match="positions"):
            parse_positions(text, 12)


def test_positions_of_thousands_of_digits_are_refused_in_a_short_line():
    digits = "9" * 5000
    for read in (lambda: parse_positions(digits, 3), lambda: parse_variant(f"M{digits}K", "MKT")):
        with pytest.raises(ValueError, match="expected (one|ranges) such as") as found:
            read()
        assert len(str(found.value)) < 300
