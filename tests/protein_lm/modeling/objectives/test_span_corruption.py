import numpy as np
import pytest

from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference.infilling import infill_proteins, parse_spans
from fast_attention.protein_lm.modeling.batches import as_corpus
from fast_attention.protein_lm.modeling.objectives import SpanCorruption
from fast_attention.protein_lm.modeling.pipeline import eval_batches, make_dataset, num_batches
from fast_attention.protein_lm.models import FlaxLM, FlaxModel

DOMAIN = make_protein_domain(length=64)
VOCAB = DOMAIN.vocab
SMALL = {"num_layers": 1, "num_heads": 2, "emb_dim": 32, "qkv_dim": 32, "mlp_dim": 64}
MOTIF = "WHKCMY"


def proteins(number, seed, lengths=(1, 60)):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice([*"ACDEFGILNP"], rng.integers(*lengths))) for _ in range(number)]


def streams(batch):
    """What is read and asked of each sequence of a batch: ids with the last target, and weights."""
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max(initial=0) + 1):
            own = segments == segment
            inputs, targets = (batch[name][row, own] for name in ("inputs", "targets"))
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            np.testing.assert_array_equal(batch["positions"][row, own], np.arange(own.sum()))
            yield np.append(inputs, targets[-1]), np.append(0, batch["weights"][row, own])


def put_together(stream, weights):
    """The sequence that a stream was made of, the hidden residues, and the number of spans."""
    first = int(np.argmax(weights > 0)) if weights.any() else len(stream)
    assert (weights[first:] == 1).all() and not weights[:first].any()
    known, written = stream[: first - 1], stream[first - 1 :]
    spans, name = {}, None
    for token in written.tolist():
        if token >= len(VOCAB):
            name = token
            spans[name] = []
        else:
            spans[name].append(token)
    assert list(spans) == list(range(len(VOCAB), len(VOCAB) + len(spans)))
    assert not spans.pop(name)  # The last sentinel ends the stream.
    tokens = [t for token in known.tolist() for t in spans.get(token, [token])]
    assert all(spans.values())
    return VOCAB.decode(tokens, stop_at_eos=True), sum(map(len, spans.values())), len(spans)


@pytest.mark.parametrize("density", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("mean", [1.0, 3.0, 8.0])
def test_a_stream_holds_its_sequence_once_and_asks_for_the_share(density, mean):
    objective = SpanCorruption(density, mean)
    given = proteins(60, 0)
    corpus = as_corpus(given, DOMAIN)
    found, hidden = [], 0
    for batch in eval_batches(corpus, DOMAIN, length=61, batch_size=8, objective=objective):
        for stream, weights in streams(batch):
            sequence, number, spans = put_together(stream, weights)
            assert number == np.clip(np.rint(density * len(sequence)), 1, len(sequence))
            assert len(stream) - 1 == len(sequence) + 1 + 2 * spans
            assert len(stream) - 1 <= objective.room(len(sequence) + 1)
            found.append(sequence)
            hidden += number
    assert sorted(found) == sorted(given)
    assert abs(hidden / sum(map(len, given)) - density) < 0.05


def test_packed_rows_hold_whole_streams_and_an_epoch_every_sequence():
    given = proteins(80, 1)
    corpus, objective = as_corpus(given, DOMAIN), SpanCorruption()
    options = {"length": 61, "row_length": 128, "batch_size": 4}
    dataset = make_dataset(corpus, DOMAIN, seed=0, num_epochs=1, objective=objective, **options)
    batches = list(dataset)
    assert len(batches) == num_batches(corpus, num_epochs=1, objective=objective, **options)
    found = [put_together(*stream)[0] for batch in batches for stream in streams(batch)]
    assert sorted(found) == sorted(given)
    assert max(batch["segment_ids"].max() for batch in batches) > 1


def test_long_sequences_are_cropped_to_rows_that_hold_their_streams():
    corpus = as_corpus(proteins(8, 2, (50, 60)), DOMAIN)
    dataset = make_dataset(
        corpus, DOMAIN, length=61, row_length=16, batch_size=4, seed=0, num_epochs=1,
        objective="span_corruption",
    )  # fmt: skip
    for batch in dataset:
        assert batch["inputs"].shape == (4, 16)
        for stream, weights in streams(batch):
            assert len(put_together(stream, weights)[0]) >= 10


def test_a_row_without_room_for_a_residue_is_refused():
    corpus = as_corpus(["ACD"], DOMAIN)
    options = {"length": 8, "row_length": 2, "batch_size": 1, "seed": 0}
    with pytest.raises(ValueError, match="a row of 2 tokens .* takes 3"):
        make_dataset(corpus, DOMAIN, objective="span_corruption", **options)


def test_spans_are_anywhere_and_differ_from_seed_to_seed():
    corpus = as_corpus(["ACDEFGHIKL"] * 64, DOMAIN)
    begins = set()
    for batch in eval_batches(
        corpus, DOMAIN, length=11, batch_size=64, objective=SpanCorruption(0.3, 3.0)
    ):
        begins |= {int(np.argmax(row >= len(VOCAB))) for row in batch["inputs"]}
    assert begins == set(range(8))


@pytest.mark.parametrize(
    "options", [{"noise_density": 0.0}, {"noise_density": 1.0}, {"mean_span_length": 0.5},
                {"num_sentinels": 1}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SpanCorruption(**options)


def test_an_objective_belongs_to_a_model_once():
    with pytest.raises(TypeError, match="needs an objective"):
        FlaxModel(DOMAIN, **SMALL)
    with pytest.raises(ValueError, match="FlaxLM has the objective causal"):
        FlaxLM(DOMAIN, objective="span_corruption", **SMALL)
    with pytest.raises(ValueError, match="one of causal, masked, span_corruption"):
        FlaxModel(DOMAIN, objective="mlm", **SMALL)


def make_model():
    return FlaxModel(
        DOMAIN,
        objective=SpanCorruption(0.25, 4.0, num_sentinels=8),
        learning_rate=3e-3,
        positions="rotary",
        **SMALL | {"num_layers": 2, "emb_dim": 64, "mlp_dim": 128},
    )


@pytest.fixture(scope="module")
def untrained():
    return make_model()


@pytest.fixture(scope="module")
def trained():
    """Trained on proteins that all have one motif, at any place."""
    rng = np.random.default_rng(0)
    given = []
    for protein in proteins(384, 3, (6, 10)):
        place = rng.integers(1, len(protein))
        given.append(protein[:place] + MOTIF + protein[place:])
    model = make_model()
    before = model.evaluate(given[:64])
    model.fit(given, batch_size=32, epochs=20)
    return model, before, model.evaluate(given[:64])


@pytest.mark.slow
def test_training_lowers_the_loss(trained):
    _, before, after = trained
    assert after["loss"] < before["loss"] - 1


@pytest.mark.slow
def test_a_hidden_part_of_the_motif_is_recovered(trained):
    """Chance is one of 20 residues, or one of 10 in the background."""
    model, _, _ = trained
    records, answers = [], []
    for number, protein in enumerate(proteins(40, 4, (7, 10))):
        begin = number % 3
        text = f"{protein[:6]}{MOTIF[:begin]}[3]{MOTIF[begin + 3 :]}{protein[6:]}"
        records.append(FastaRecord(str(number), "", text))
        answers.append(protein[:6] + MOTIF + protein[6:])
    filled = list(infill_proteins(model, records, temperature=0.0))
    assert all(
        len(one.sequence) == len(answer) for one, answer in zip(filled, answers, strict=True)
    )
    right = [one.sequence == answer for one, answer in zip(filled, answers, strict=True)]
    assert np.mean(right) > 0.5


def known_parts(text, sequence):
    """Whether a sequence has the known parts of a text in their order, and the spans' lengths."""
    item = parse_spans(text, VOCAB)
    place = len(item.known[0])
    assert sequence.startswith(VOCAB.decode(item.known[0]))
    if len(item.bounds) == 1:
        low, high = item.bounds[0]
        rest = VOCAB.decode(item.known[1])
        assert sequence.endswith(rest)
        return low <= len(sequence) - place - len(rest) <= high
    for (low, high), known in zip(item.bounds, item.known[1:], strict=True):
        assert low == high
        place += low
        assert sequence[place : place + len(known)] == VOCAB.decode(known)
        place += len(known)
    return place == len(sequence)


@pytest.mark.parametrize("text", ["MK[5]GGA", "[3]WH**A*", "AC[2-8]DE", "A[1-3]", "*[4]"])
def test_known_residues_stay_and_spans_have_their_lengths(untrained, text):
    options = {"num_samples": 20, "temperature": 2.0}
    found = list(infill_proteins(untrained, [FastaRecord("a", "", text)], seed=1, **options))
    assert len({record.sequence for record in found}) > 10
    for record in found:
        assert known_parts(text, record.sequence) and set(record.sequence) <= set(VOCAB.letters)


def test_a_sample_does_not_depend_on_how_many_there_are(untrained):
    protein, options = FastaRecord("a", "", "AC[2-8]DE"), {"seed": 1, "temperature": 2.0}
    several, few = (
        [
            record.sequence
            for record in infill_proteins(untrained, [protein], num_samples=number, **options)
        ]
        for number in (20, 3)
    )
    assert several[:3] == few


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_filling_in_is_reading_the_whole_stream_again_for_each_residue(positions):
    """Greedy residues are the most probable letters, and the log-probability is theirs."""
    model = FlaxModel(DOMAIN, objective="span_corruption", positions=positions, **SMALL)
    (record,) = infill_proteins(model, [FastaRecord("a", "", "AC**DE[2]G")], temperature=0.0)
    first, second = len(VOCAB), len(VOCAB) + 1
    sequence, encode = record.sequence, VOCAB.encode
    stream = np.array([
        *encode("AC"), first, *encode("DE"), second, *encode("G"), VOCAB.eos,
        first, *encode(sequence[2:4]), second, *encode(sequence[6:8]), second + 1,
    ])[None]  # fmt: skip
    ones = np.ones_like(stream)
    batch = {"inputs": stream, "segment_ids": ones, "positions": np.arange(stream.size)[None]}
    logits = np.asarray(model.logits(batch)[0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = [9, 10, 12, 13]
    letters = np.array(VOCAB.ordinary_ids)
    for place in places:
        assert stream[0, place] == letters[logs[place - 1, letters].argmax()]
    total = sum(logs[place - 1, stream[0, place]] for place in places)
    told = dict(part.split("=") for part in record.description.split())
    assert float(told["fill_log_probability"]) == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("MK", {}, "nothing to fill in"),
        ("*A" * 8, {}, "8 spans; the model has sentinels for 7"),
        ("M*", {"rounds": 2}, "leave rounds out"),
        ("M[2", {}, r"'\['"),
    ],
)
def test_bad_input_is_refused(untrained, text, options, message):
    with pytest.raises(ValueError, match=message):
        infill_proteins(untrained, [FastaRecord("a", "", text)], **options)


def test_a_causal_model_does_not_fill_in():
    with pytest.raises(RunError, match="masked or span_corruption"):
        infill_proteins(FlaxLM(DOMAIN, **SMALL), [FastaRecord("a", "", "M*")])


def test_scores_do_not_depend_on_what_they_are_computed_with(untrained):
    model = untrained
    given = ["ACDE", "ACDEFWHKCMYG", "A"]
    together = model.score(given)
    for sequence, score in zip(given, together, strict=True):
        (alone,) = model.score([sequence])
        assert alone.num_residues == score.num_residues == len(sequence)
        assert score.pseudo_log_likelihood == pytest.approx(alone.pseudo_log_likelihood, abs=1e-3)


def test_learned_positions_have_room_for_the_sentinels():
    model = FlaxModel(make_protein_domain(length=20), objective="span_corruption", **SMALL)
    longest = "ACDEFGHIKLMNPQRSTVWY"
    model.fit([longest] * 8, batch_size=4)
    assert np.isfinite(model.score([longest])[0].pseudo_log_likelihood)
    (record,) = infill_proteins(model, [FastaRecord("a", "", "ACDEFGHI[4]NPQRSTVW")])
    assert len(record.sequence) == 20
    with pytest.raises(ValueError, match="21 residues"):
        infill_proteins(model, [FastaRecord("a", "", "ACDEFGHI[5]NPQRSTVW")])
