import gin
import pytest

from fast_attention import FastAttention
from fast_attention.protein_lm import gin_registry
from fast_attention.protein_lm.modeling.objectives import Causal, Masked
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = """
make_protein_domain.length = 8
FlaxModel.emb_dim = 8
FlaxModel.num_heads = 1
FlaxModel.num_layers = 1
FlaxModel.qkv_dim = 8
FlaxModel.mlp_dim = 8
"""


def configure(tmp_path, text, bindings=()):
    path = tmp_path / "run.gin"
    path.write_text(SIZES + text)
    gin_registry.configure([path], bindings)


@pytest.mark.parametrize(
    "factory", ["make_fast_softmax_attention", "make_fast_generalized_attention"]
)
def test_what_is_bound_to_flax_model_reaches_both_models(tmp_path, factory):
    configure(tmp_path, f"FlaxModel.attention_fn = @{factory}()\n{factory}.nb_features = 24")
    for model_class in (FlaxLM, FlaxBERT):
        seen = []

        def record(config, attention_fn, *, rngs, seen=seen):
            seen.append(attention_fn)
            raise InterruptedError

        with pytest.raises(InterruptedError):
            model_class(model_cls=record)
        assert isinstance(seen[0], FastAttention)
    assert f"FlaxModel.attention_fn = @{factory}()" in gin.operative_config_str()
    assert f"{factory}.nb_features = 24" in gin.operative_config_str()


def test_one_length_of_queries_and_keys_is_a_binding(tmp_path):
    configure(tmp_path, "FlaxModel.qk_norm = True")
    seen = []

    def record(config, attention_fn, *, rngs):
        seen.append(config)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        FlaxLM(model_cls=record)
    assert seen[0].qk_norm is True


def test_what_is_bound_to_a_subclass_wins(tmp_path):
    configure(tmp_path, "FlaxModel.mlp_dim = 16\nFlaxLM.mlp_dim = 24\nFlaxBERT.mask_rate = 0.5")
    lm, bert = FlaxLM(), FlaxBERT()
    assert (lm.config.mlp_dim, bert.config.mlp_dim) == (24, 16)
    assert lm.objective == Causal()
    assert bert.objective == Masked(mask_rate=0.5)
    assert (lm.config.causal, bert.config.causal) == (True, False)


def test_the_domain_can_be_bound(tmp_path):
    configure(tmp_path, "make_protein_domain.include_anomalous_amino_acids = False")
    assert FlaxLM().config.vocab_size == 24
    assert FlaxLM().config.max_len == 8
    gin_registry.configure([tmp_path / "run.gin"], ["make_protein_domain.length = 9"])
    assert FlaxLM().domain.length == 9


def test_includes_take_their_turn(tmp_path):
    """Two folders have a file of the same name; each includer means its own."""
    for name, width in (("one", 16), ("two", 24)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "base.gin").write_text(f"FlaxModel.mlp_dim = {width}\nFlaxModel.emb_dim = 2\n")
        (folder / "run.gin").write_text(
            "FlaxModel.mlp_dim = 1\ninclude 'base.gin'\nFlaxModel.emb_dim = 4\n"
        )
        (tmp_path / "sizes.gin").write_text(SIZES)
        gin_registry.configure([tmp_path / "sizes.gin", folder / "run.gin"])
        assert (FlaxLM().config.mlp_dim, FlaxLM().config.emb_dim) == (width, 4)


def test_errors_name_the_file_and_the_line(tmp_path):
    (tmp_path / "base.gin").write_text("\n")
    text = "# a comment\ninclude 'base.gin'\n\nexperiment.max_train_step = 3\n"
    (tmp_path / "run.gin").write_text(text)
    with pytest.raises(ValueError, match=r"run\.gin(.|\n)*line 4"):
        gin_registry.configure([tmp_path / "run.gin"])


def test_a_file_that_includes_itself_is_refused(tmp_path):
    (tmp_path / "one.gin").write_text("include 'two.gin'\n")
    (tmp_path / "two.gin").write_text("include 'one.gin'\n")
    with pytest.raises(ValueError, match="includes itself"):
        gin_registry.configure([tmp_path / "one.gin"])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("experiment.max_train_step = 3", ValueError, "max_train_step"),
        ("make_fast_softmax_attention.features = 3", ValueError, "features"),
        ("FlaxModle.emb_dim = 3", ValueError, "FlaxModle"),
        ("FlaxModel.attention_fn = @make_slow_attention()", ValueError, "make_slow_attention"),
        ("FlaxModel.emb_dim = ", SyntaxError, "parse"),
        ("include 'absent.gin'", OSError, "absent.gin"),
    ],
)
def test_a_bad_setting_is_refused_when_read(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        configure(tmp_path, text)


def test_an_unknown_model_parameter_is_refused_when_the_model_is_made(tmp_path):
    configure(tmp_path, "FlaxModel.num_head = 2")
    with pytest.raises(TypeError, match="did you mean 'num_heads'"):
        FlaxLM()


def test_a_new_configuration_forgets_the_old(tmp_path):
    configure(tmp_path, "FlaxModel.mlp_dim = 64")
    configure(tmp_path, "")
    assert FlaxLM().config.mlp_dim == 8


@pytest.mark.parametrize("name", ["demo", "lm_softmax.gin", "protein_lm_configs/small.gin"])
def test_settings_of_the_package_are_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    found = gin_registry.find_settings(name)
    assert found.is_file() and found.stem in name
    gin_registry.configure([name])


def test_a_file_comes_before_settings_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.gin").write_text("experiment.max_train_steps = 3")
    gin_registry.configure(["demo.gin"])
    assert gin.query_parameter("experiment.max_train_steps") == 3
    assert gin_registry.find_settings("demo") == gin_registry.DEMO


@pytest.mark.parametrize("name", ["dmeo", "elsewhere/demo.gin", "."])
def test_settings_that_are_nowhere_are_told_with_the_names_that_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"^{name}: .*lm_softmax"):
        gin_registry.configure([name])
