"""``model.json``: a model made again from plain data, and nothing else done by it."""

import json

import gin
import jax.numpy as jnp
import pytest

import fast_attention
from fast_attention.protein_lm import (
    FlaxBERT,
    FlaxLM,
    ProteinVocab,
    Vocabulary,
    gin_registry,
    make_protein_domain,
)
from fast_attention.protein_lm.data.alphabets import ALPHABETS
from fast_attention.protein_lm.data.domains import VariableLengthDiscreteDomain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.loading import load_run, open_run
from fast_attention.protein_lm.modeling.objectives import SpanCorruption
from fast_attention.protein_lm.models import FlaxModel
from fast_attention.protein_lm.runs import attention_recipes, model_file, model_gin
from fast_attention.protein_lm.runs.model_file import OwnPartError

SMALL = {"emb_dim": 8, "num_heads": 2, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8}
SOFTMAX = fast_attention.make_fast_softmax_attention(nb_features=8, exact_window=2)
FUNCTIONS = {
    "exact": None,
    "exact_function": fast_attention.make_softmax_attention(),
    "softmax": SOFTMAX,
    "generalized": fast_attention.make_fast_generalized_attention(kernel_fn=jnp.tanh),
    "efficient": fast_attention.make_efficient_attention(),
    "lsh": fast_attention.make_lsh_attention(bucket_size=4, n_hashes=2),
    "local": fast_attention.make_local_attention(window_size=4),
    "strided": fast_attention.make_strided_attention(SOFTMAX, 2),
}


def own_attention(query, key, value, **options):
    return fast_attention.make_softmax_attention()(query, key, value, **options)


def written(path, model):
    path.write_text(model_file.to_text(model_file.describe(model)))
    return path


def rebuilt(path, model):
    about = model_file.read(written(path, model))
    return about, model_file.build(path, about)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_an_attention_function_is_made_again(name, tmp_path):
    model = FlaxLM(make_protein_domain(length=16), attention_fn=FUNCTIONS[name], **SMALL)
    _, again = rebuilt(tmp_path / "model.json", model)
    assert repr(again.attention_fn) == repr(model.attention_fn)
    assert again.config == model.config and type(again) is FlaxLM


def test_a_masked_model_with_all_its_options_is_made_again(tmp_path):
    vocab = ProteinVocab(include_align_tokens=True, include_eos=True, include_mask=True)
    domain = VariableLengthDiscreteDomain(vocab, 20, 3)
    options = {"mask_rate": 0.2, "ema_decay": 0.9, "grad_clip": 2, "dtype": jnp.bfloat16}
    model = FlaxBERT(domain, random_seed=3, weight_decay=0.5, **options, **SMALL)
    about, again = rebuilt(tmp_path / "model.json", model)
    assert model_file.describe(again) == model_file.describe(model) == about
    assert again.objective == model.objective and again.domain.vocab == vocab
    assert again.config.dtype == jnp.bfloat16 and again.schedule(5) == model.schedule(5)


def test_a_vocabulary_of_any_tokens_is_made_again(tmp_path):
    vocab = Vocabulary(["AAA", "CCC"], include_bos=True, include_eos=True, bos_token="begin")
    model = FlaxLM(VariableLengthDiscreteDomain(vocab, 8), **SMALL)
    _, again = rebuilt(tmp_path / "model.json", model)
    assert again.domain.vocab == vocab


def test_an_objective_with_its_options_is_made_again(tmp_path):
    objective = SpanCorruption(0.2, 2.0, num_sentinels=10)
    domain = make_protein_domain(length=16, alphabet="esm")
    model = FlaxModel(domain, objective=objective, **SMALL)
    about, again = rebuilt(tmp_path / "model.json", model)
    assert type(again) is FlaxModel and again.objective == objective
    assert again.tokens == model.tokens and again.domain.vocab == ALPHABETS["esm"]
    lines = model_gin.gin_lines(tmp_path / "model.json", about)
    gin_registry.configure(bindings=lines)
    described = model_file.describe(gin.get_bindings("experiment")["model_cls"]())
    assert (described["objective"], described["alphabet"]) == (
        about["objective"],
        about["alphabet"],
    )


@pytest.mark.parametrize("name", ["softmax", "strided", "generalized"])
def test_gin_bindings_make_the_same_model(name, tmp_path):
    model = FlaxLM(make_protein_domain(length=16), attention_fn=FUNCTIONS[name], **SMALL)
    path = tmp_path / "model.json"
    about = model_file.read(written(path, model))
    gin_registry.configure(bindings=model_gin.gin_lines(path, about))
    again = gin.get_bindings("experiment")["model_cls"]()
    described = model_file.describe(again)
    for part in ("alphabet", "domain", "transformer", "attention", "mesh"):
        assert described[part] == about[part]


CHANGES = {
    "unknown_field": (("transformer", "planted"), 1, "transformer.planted is unknown"),
    "type": (("transformer", "num_layers"), "2", 'transformer.num_layers is "2"; expected an int'),
    "boolean_for_integer": (("transformer", "emb_dim"), True, "emb_dim is true; expected an int"),
    "huge": (("transformer", "num_layers"), 10**9, "num_layers is 1000000000; at most 4096"),
    "range": (("transformer", "dropout_rate"), 2.0, "model.json: .*dropout_rate must be in"),
    "sampling": (("sampling", "top_p"), -1.0, "sampling.top_p is -1.0; expected a number above 0"),
    "optimizer": (("optimizer", "batch_size"), 0, "optimizer.batch_size is 0; expected a whole"),
    "dtype": (("transformer", "dtype"), "object", 'transformer.dtype is "object"; expected one'),
    "class": (("model",), "os.system", 'model is "os.system"; expected FlaxModel or FlaxLM or F'),
    "factory": (("attention", "factory"), "os.system", 'attention.factory is "os.system"; expec'),
    "argument": (("attention", "arguments", "nb_features"), "9", 'nb_features is "9"; expected an'),
    "array": (("attention", "arguments", "projection_matrix"), [[1]], "expected null"),
    "estimator": (("attention", "arguments", "estimator"), "best", "Unknown estimator 'best'"),
    "token": (
        ("alphabet", "tokens"),
        ["A", "C"],
        "these values do not describe a valid model: .*different tokens",
    ),
    "meaning": (
        ("alphabet", "gaps"),
        "B",
        "these values do not describe a valid model: .*different tokens",
    ),
    "objective": (("objective", "name"), "os.system", "objective.name is .*expected causal or "),
    "option": (("objective", "planted"), 1, "objective.planted is unknown"),
    "other": (("objective",), {"name": "masked"}, "objective.mask_rate is missing"),
    "version": (("format_version",), 99, "format_version 99, and this version .* reads 4"),
    "format": (("format",), "other", "describes no model"),
    "own": (("attention",), {"own": "m.f"}, 'attention is "m.f", code that .* --gin_file .*model='),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_what_is_unknown_is_an_error_that_names_file_and_field(name, tmp_path):
    place, value, message = CHANGES[name]
    model = FlaxLM(make_protein_domain(length=16), attention_fn=SOFTMAX, **SMALL)
    path = written(tmp_path / "model.json", model)
    about = json.loads(path.read_text())
    holder = about
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    path.write_text(json.dumps(about))
    with pytest.raises(RunError, match=message) as error:
        open_run(tmp_path)
    assert str(path) in str(error.value)


def test_a_model_with_code_of_its_authors_is_opened_with_the_gin_file_or_the_object(
    lm_run, tmp_path, tiny_config
):
    for path in (lm_run / "checkpoints").rglob("*"):
        target = tmp_path / "checkpoints" / path.relative_to(lm_run / "checkpoints")
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    about = json.loads((lm_run / "model.json").read_text())
    about["attention"] = attention_recipes.describe(own_attention)
    assert about["attention"]["own"].endswith("own_attention")
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(OwnPartError, match="--gin_file"):
        load_run(tmp_path)
    expected = load_run(lm_run).model
    given = open_run(lm_run).model
    for options in ({"gin_file": [str(tiny_config)]}, {"model": given}):
        found = load_run(tmp_path, **options).model
        assert found.score(["MKT"]) == expected.score(["MKT"])
    other = FlaxLM(make_protein_domain(length=64, include_mask=False), **SMALL)
    with pytest.raises(RunError, match="another alphabet"):
        load_run(tmp_path, model=other)
