"""Published ESM-2 and BERT models: numbers, forms of files, and files that are damaged."""

import json
import math
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from fast_attention import make_fast_softmax_attention, make_local_attention
from fast_attention.models import load_pretrained
from fast_attention.models.originals import torch_files
from fast_attention.models.originals.checkpoint_arrays import read_safetensors
from tests.models.originals import torch_archive

DATA = Path(__file__).parents[2] / "data" / "pretrained"
KINDS = ["esm2_tiny", "bert_tiny"]


def expected(kind):
    return np.load(DATA / kind / "expected.npz")


def check(model, kind):
    """Logits and the stream after every block, where the mask is true."""
    known = expected(kind)
    ids, mask = jnp.asarray(known["ids"], jnp.int32), known["attention_mask"].astype(bool)
    blocks = len(model.stack.blocks)
    found = model.hidden_states(ids, [*range(blocks), "last"], key_mask=jnp.asarray(mask))
    for layer, x in enumerate(found):
        np.testing.assert_allclose(x[mask], known[f"hidden_{layer}"][mask], atol=2e-5)
    logits = model(ids, key_mask=jnp.asarray(mask))
    np.testing.assert_allclose(logits[mask], known["logits"][mask], atol=5e-5)


@pytest.fixture
def folder(tmp_path, request):
    """A copy of a published model that may be changed."""
    return shutil.copytree(DATA / request.param, tmp_path / request.param)


both = pytest.mark.parametrize("folder", KINDS, indirect=True)
an_esm = pytest.mark.parametrize("folder", ["esm2_tiny"], indirect=True)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_original(kind):
    found = load_pretrained(DATA / kind)
    check(found.model, kind)
    heads = ["esm.contact_head.regression.bias", "esm.contact_head.regression.weight"]
    assert found.other_heads == (heads if kind == "esm2_tiny" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_padded_equals_alone(kind):
    known, model = expected(kind), load_pretrained(DATA / kind).model
    length = int(known["attention_mask"][1].sum())
    alone = model(jnp.asarray(known["ids"][1:2, :length], jnp.int32))
    np.testing.assert_allclose(alone[0], known["logits"][1, :length], atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone(kind):
    """Two sequences in one row, each with its own positions and share of masked tokens."""
    known, model = expected(kind), load_pretrained(DATA / kind).model
    lengths = known["attention_mask"].sum(axis=1)[:2]
    pieces = [known["ids"][row, :n] for row, n in enumerate(lengths)]
    packed = model(
        jnp.asarray(np.concatenate(pieces), jnp.int32)[None],
        positions=jnp.asarray(np.concatenate([np.arange(n) for n in lengths]))[None],
        segment_ids=jnp.asarray(np.repeat([0, 1], lengths))[None],
    )
    logits = np.concatenate([known["logits"][row, :n] for row, n in enumerate(lengths)])
    np.testing.assert_allclose(packed[0], logits, atol=5e-5)


def test_another_attention_function_takes_its_place():
    ids = jnp.asarray(expected("esm2_tiny")["ids"][2:], jnp.int32)
    exact = load_pretrained(DATA / "esm2_tiny").model(ids)
    same = load_pretrained(DATA / "esm2_tiny", attention_fn=make_local_attention(64)).model
    np.testing.assert_allclose(same(ids), exact, atol=5e-5)
    linear = make_fast_softmax_attention(nb_features=16)
    first, second = (
        load_pretrained(DATA / "esm2_tiny", attention_fn=linear, rngs=nnx.Rngs(seed)).model(ids)
        for seed in (0, 1)
    )
    assert jnp.abs(first - second).max() > 1e-3
    assert jnp.isfinite(first).all()


def arrays_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@both
def test_arrays_in_several_files(folder):
    arrays = arrays_of(folder)
    (folder / "model.safetensors").unlink()
    places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(arrays)}
    for file in set(places.values()):
        part = {name: arrays[name] for name in arrays if places[name] == file}
        safetensors.numpy.save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    check(load_pretrained(folder).model, folder.name)
    for file, message in [("../part-0.safetensors", "beside it"), ("gone", "not there")]:
        index.write_text(json.dumps({"weight_map": places | {next(iter(arrays)): file}}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)


@both
def test_arrays_of_pytorch(folder):
    arrays = arrays_of(folder)
    (folder / "model.safetensors").unlink()
    torch_archive.save_arrays(folder / "pytorch_model.bin", arrays)
    check(load_pretrained(folder).model, folder.name)


@both
def test_half_precision_is_read(folder):
    arrays = {name: array.astype(np.float16) for name, array in arrays_of(folder).items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    model = load_pretrained(folder).model
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype("float32")}


FAIR_ESM = {
    r"esm.encoder.layer.": "encoder.sentence_encoder.layers.",
    "attention.LayerNorm": "self_attn_layer_norm",
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    ".LayerNorm": ".final_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "esm.embeddings.word_embeddings": "encoder.sentence_encoder.embed_tokens",
    "esm.encoder.emb_layer_norm_after": "encoder.sentence_encoder.emb_layer_norm_after",
    "esm.contact_head": "encoder.sentence_encoder.contact_head",
    "lm_head": "encoder.lm_head",
}


def test_file_of_fair_esm(tmp_path):
    arrays = arrays_of(DATA / "esm2_tiny")
    del arrays["esm.rotary_embeddings.inv_freq"]
    renamed = {}
    for name, array in arrays.items():
        for old, new in FAIR_ESM.items():
            name = name.replace(old, new)
        renamed[name] = array
    options = {
        "encoder_layers": 2,
        "encoder_embed_dim": 32,
        "encoder_attention_heads": 4,
        "token_dropout": True,
    }
    namespace = torch_archive.Called(torch_archive.Name("argparse", "Namespace"), (), options)
    path = tmp_path / "esm2_t2.pt"
    torch_archive.save_arrays(
        path, renamed, lambda tensors: {"cfg": {"model": namespace}, "model": tensors}
    )
    check(load_pretrained(path).model, "esm2_tiny")
    torch_archive.save_arrays(path, renamed)
    with pytest.raises(ValueError, match="encoder_layers"):
        load_pretrained(path)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "t5"}, "'t5'; expected one of 'esm', 'bert'"),
        ({"model_type": None}, "None; expected one of"),
        ({"model_type": {"a": 1}}, "config.json has model_type .* expected one of"),
        ({"layer_norm_eps": 10**400}, "config.json: layer_norm_eps is 1000.* a positive number"),
        ({"rope_theta": 1e300}, "rope_theta is 1e.300; expected a positive number"),
        ({"num_hidden_layers": 2**20}, "num_hidden_layers is 1048576, but the files"),
        ({"hidden_size": 1.5}, "hidden_size is 1.5; expected an integer"),
        ({"hidden_size": 30}, "no multiple of 4 heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 3}, "missing: .*stack.blocks.2"),
        ({"num_hidden_layers": 1}, "left over: esm.encoder.layer.1"),
        ({"intermediate_size": 65}, "of another shape: esm.encoder.layer.0.intermediate"),
        ({"position_embedding_type": "relative_key"}, "expected one of 'rotary', 'absolute'"),
        ({"is_folding_model": True}, "is_folding_model is True; expected one of False"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'; expected a positive number"),
        ({"token_dropout": 1}, "token_dropout is 1; expected true or false"),
    ],
    ids=str,
)
@an_esm
def test_a_description_that_does_not_fit_is_an_error(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


@both
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_weights_of_integers_are_refused(folder, dtype):
    """Quantized ones mean nothing without their scales."""
    arrays = arrays_of(folder)
    name = next(name for name in arrays if name.endswith("query.weight"))
    arrays[name] = arrays[name].astype(dtype)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=f"not of floating-point numbers: {name} {np.dtype(dtype)}"
    ):
        load_pretrained(folder)


def test_a_type_that_is_not_read_is_named(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="'x' has numbers of the type 'F8_E4M3', .*: convert them"):
        read_safetensors(path)


@both
@pytest.mark.parametrize("shape", [[], [0], [0, 10**30], [0, 2**62, 4]], ids=str)
def test_an_array_of_another_shape_is_named(folder, shape):
    """Also of a shape whose part cannot be taken, or that no array can have."""
    names, size = list(arrays_of(folder)), 4 * math.prod(shape)
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [size * i, size * (i + 1)]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(size * len(names))
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder.name} do not fit .*of another shape"):
        load_pretrained(folder)


@an_esm
def test_damaged_files_are_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:100],
        whole[:-4],
        (2**62).to_bytes(8, "little") + whole[8:],
        whole[:8] + b"[" + whole[9:],
        whole + b"0000",
        overlapping(whole),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            load_pretrained(folder)
    arrays = arrays_of(DATA / "esm2_tiny")
    arrays["lm_head.bias"] = np.full_like(arrays["lm_head.bias"], np.nan)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError, match="lm_head.bias has values that are not finite"):
        load_pretrained(folder)
    path.unlink()
    with pytest.raises(ValueError, match="has no arrays"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        load_pretrained(folder / "nowhere")


def overlapping(whole):
    """The same file with one array moved onto another one."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    entry = header["lm_head.dense.weight"]
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = [begin - 4, end - 4]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


class TestPyTorchFiles:
    """What is in a file is data: no name in it is imported or called."""

    values = np.arange(6, dtype=np.float32)

    def save(self, folder, value, **options):
        (folder / "model.safetensors").unlink(missing_ok=True)
        path = folder / "pytorch_model.bin"
        torch_archive.save(path, value, {"0": self.values}, **options)

    def refused(self, folder, message):
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)

    @an_esm
    @pytest.mark.parametrize(
        ("module", "name"),
        [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("numpy", "load")],
    )
    def test_other_names_are_refused(self, folder, module, name, tmp_path):
        target = tmp_path / "made"
        call = torch_archive.Called(torch_archive.Name(module, name), (f"touch {target}",))
        self.save(folder, {"x": call})
        self.refused(folder, f"names {module}.{name}, which is none of the constructors")
        assert not target.exists()

    @an_esm
    def test_tensors_stay_inside_their_storage(self, folder):
        make = torch_archive.tensor
        for tensor in (
            make("0", self.values, shape=(7,), stride=(1,)),
            make("0", self.values, shape=(2, 3), stride=(4, 1)),
            make("0", self.values, shape=(6,), stride=(1,), offset=1),
            make("0", self.values, shape=(10**6, 10**6), stride=(0, 0)),
            make("0", self.values, shape=(2,), stride=(-1,)),
            make("0", self.values, shape=(2,), stride=(1, 1)),
            make("1", self.values),
        ):
            self.save(folder, {"x": tensor})
            self.refused(folder, "pytorch_model.bin cannot be read: a tensor")

    @an_esm
    def test_other_archives_are_refused(self, folder):
        tensor = torch_archive.tensor("0", self.values)
        self.save(folder, {"x": tensor}, compression=zipfile.ZIP_DEFLATED)
        self.refused(folder, "compressed")
        self.save(folder, [tensor])
        self.refused(folder, "holds a list")
        self.save(folder, {"x": 1})
        self.refused(folder, "no tensors by name")
        path = folder / "pytorch_model.bin"
        whole = path.read_bytes()
        for damaged in (b"", b"\x80\x02", whole[:-30]):
            path.write_bytes(damaged)
            self.refused(folder, "not a zip archive")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other", "")
        self.refused(folder, "has no data.pkl")

    @an_esm
    def test_random_damage_is_a_value_error(self, folder):
        self.save(folder, {"x": torch_archive.tensor("0", self.values)})
        path = folder / "pytorch_model.bin"
        whole, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
        for _ in range(200):
            changed = whole.copy()
            for place in rng.integers(len(whole), size=3):
                changed[place] = rng.integers(256)
            path.write_bytes(changed)
            self.refused(folder, ".")


def with_state(name, text):
    """A pickle that sets an attribute of what it names."""
    attribute = b"X" + len(text).to_bytes(4, "little") + text.encode()
    module = name.rpartition(".")
    return f"\x80\x02c{module[0]}\n{module[2]}\nN}}".encode("latin-1") + attribute * 2 + b"s\x86b."


@pytest.mark.parametrize(
    ("name", "text"), [("torch.BFloat16Storage", "dtype"), ("argparse.Namespace", "left")]
)
def test_a_file_leaves_nothing_behind_in_the_process(tmp_path, name, text):
    before = jnp.bfloat16.dtype
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", with_state(name, text))
    try:
        with pytest.raises(ValueError, match=r"model\.pt"):
            torch_files.read_torch(path)
        assert jnp.bfloat16.dtype is before
        assert not hasattr(torch_files.Options, "left")
    finally:
        jnp.bfloat16.dtype = before
