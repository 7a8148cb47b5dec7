"""Folders against what transformers computed from them; what is refused; what is written."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from experiments import files
from experiments.models import huggingface
from experiments.models.config import Llama3Rope
from experiments.models.decoder import Decoder, DecoderConfig
from tests.experiments.models.folders import DATA, assert_as_expected, logits_of

FAMILIES = ["llama", "qwen2", "qwen3"]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Copies a family's folder, with its config.json changed."""

    def copy(family="qwen3", **config):
        shutil.copytree(DATA / family, tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return tmp_path / "model"

    return copy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_logits_and_continuations_are_those_of_transformers(family, scan_layers):
    loaded = huggingface.load(DATA / family, dtype="float32", scan_layers=scan_layers)
    assert_as_expected(*loaded, np.load(DATA / family / "expected.npz"))


def test_config_says_what_the_families_differ_in():
    llama, qwen2, qwen3 = (huggingface.config_of(DATA / family) for family in FAMILIES)
    assert llama == DecoderConfig(
        64, 16, 2, 4, 2, 16, 24, 500.0, 1e-5, False, False, False, Llama3Rope(8.0, 1.0, 4.0, 64)
    )
    assert qwen2.qkv_bias
    assert qwen2.head_dim == 8
    assert qwen2.dtype == "bfloat16"
    assert qwen3.qk_norm
    assert qwen3.rope_theta == 1e6


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_old_spelling_of_config_reads_the_same(folder, family):
    expected = huggingface.config_of(DATA / family)
    path = folder(family) / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if family == "llama" else None
    path.write_text(json.dumps(config))
    assert huggingface.config_of(path.parent) == expected


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3", {"architectures": ["MistralForCausalLM"]}, "architectures=.*Mistral"),
        ("qwen3", {"model_type": "qwen2"}, "model_type='qwen2'"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' .* must be 'silu'"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types='sliding_attention'"),
        ("qwen2", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling and rope_param"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("qwen2", {"rope_theta": 5e5}, "rope_theta=500000.0 differs"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"\['factor'\]"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("qwen3", {"dtype": "float16"}, "dtype='float16' .* ask for dtype"),
        ("qwen3", {"hidden_size": None}, "'hidden_size' is missing"),
        ("qwen3", {"head_dim": None}, "'head_dim' is missing"),
        ("llama", {"hidden_size": 15, "head_dim": None}, "'head_dim' is missing"),
        ("llama", {"hidden_size": "16"}, "hidden_size='16' is no positive number"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 is no positive number"),
        ("llama", {"hidden_size": 16.5}, "hidden_size: Input should be a valid integer"),
        ("qwen3", {"num_key_value_heads": 3}, "kv_heads=3"),
        ("qwen3", {"logit_softcap": 30.0}, "logit_softcap=30.0 is not supported"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(folder, family, change, message):
    changed = folder(family, **change)
    with pytest.raises(files.Failure, match=message):
        huggingface.load(changed)


def test_llama_without_new_keys_is_read(folder):
    path = folder("llama") / "config.json"
    config = json.loads(path.read_text())
    for key in ("num_key_value_heads", "head_dim", "rope_parameters"):
        del config[key]
    path.write_text(json.dumps(config))
    found = huggingface.config_of(path.parent)
    assert (found.kv_heads, found.head_dim, found.rope_theta) == (4, 4, 10_000.0)


def change_tensors(folder, change):
    tensors = load_file(folder / WHOLE)
    change(tensors)
    save_file(tensors, folder / WHOLE)


UP = "model.layers.1.mlp.up_proj.weight"
TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"{UP} is missing"),
        (lambda t: t.update(other=t[UP]), "other is no tensor of such a decoder"),
        (lambda t: t.update({UP: t[UP].T.copy()}), rf"{UP} has the shape \(16, 24\).* \(24, 16\)"),
        (lambda t: t.update({UP: t[UP].astype("float16")}), f"{UP} is float16, not float32"),
        (lambda t: t.update({"lm_head.weight": t[TABLE] + 1}), "lm_head.weight differs from"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, change, message):
    changed = folder()
    change_tensors(changed, change)
    with pytest.raises(files.Failure, match=message):
        huggingface.load(changed)


def test_integers_are_refused_whatever_dtype_is_asked_for(folder):
    changed = folder()
    change_tensors(changed, lambda t: t.update({UP: t[UP].astype("int32")}))
    with pytest.raises(files.Failure, match=f"{UP} is I32, not floating"):
        huggingface.load(changed, dtype="float32")


def test_a_tied_head_may_be_there_too(folder):
    changed = folder()
    change_tensors(changed, lambda t: t.update({"lm_head.weight": t[TABLE].copy()}))
    found, expected = (huggingface.load(path)[1] for path in (changed, DATA / "qwen3"))
    chex.assert_trees_all_equal(found, expected)


def test_other_dtypes_are_cast_when_asked_for(folder):
    changed = folder()
    change_tensors(changed, lambda t: t.update({name: t[name].astype("float16") for name in t}))
    _, params = huggingface.load(changed, dtype="bfloat16")
    _, expected = huggingface.load(DATA / "qwen3")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    chex.assert_trees_all_close(wide, expected, rtol=0.01)


def damage_shard(folder):
    next(folder.glob("model-*")).write_bytes(b"nothing")


def remove_shard(folder):
    next(folder.glob("model-*")).unlink()


def drop_from_index(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][UP]
    (folder / INDEX).write_text(json.dumps(index))


def move_in_index(folder):
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][TABLE] = shards[index["weight_map"][TABLE] == shards[0]]
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_shard, "safetensors is damaged"),
        (remove_shard, "No such file"),
        (drop_from_index, f"{UP} is not in the index"),
        (move_in_index, f"{TABLE} is (missing from|not in the index)"),
        (lambda folder: (folder / INDEX).write_text("{}"), "index.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "No such file"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, message):
    changed = folder("llama")
    damage(changed)
    with pytest.raises(files.Failure, match=message):
        huggingface.load(changed)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_again_to_the_bit(tmp_path, family, scan_layers):
    loaded = huggingface.load(DATA / family, scan_layers=scan_layers)
    huggingface.save(tmp_path / "new", *loaded, source=DATA / family, max_shard_bytes=16_000)
    graphdef, params = huggingface.load(tmp_path / "new", scan_layers=scan_layers)
    assert graphdef == loaded[0]
    chex.assert_trees_all_equal(params, loaded[1])

    shards = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    for name in huggingface.COPIED:
        assert (tmp_path / "new" / name).exists() == (DATA / family / name).exists()


def test_saved_without_a_source_in_one_file(tmp_path):
    loaded = huggingface.load(DATA / "qwen3")
    (tmp_path / "new").mkdir()
    huggingface.save(tmp_path / "new", *loaded)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", WHOLE]
    chex.assert_trees_all_equal(huggingface.load(tmp_path / "new")[1], loaded[1])


def test_nothing_is_written_over_or_in_part(tmp_path, monkeypatch):
    loaded = huggingface.load(DATA / "qwen3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(files.Failure, match="mine is there already"):
        huggingface.save(tmp_path / "mine", *loaded)
    with pytest.raises(files.Failure, match="another shape"):
        huggingface.save(tmp_path / "new", *loaded, source=DATA / "llama")
    narrow, _ = huggingface.load(DATA / "qwen3", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"bfloat16 \(.*got float32"):
        huggingface.save(tmp_path / "new", narrow, loaded[1])

    def fail(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(huggingface.shards, "save_file", fail)
    with pytest.raises(files.Failure, match="no space left"):
        huggingface.save(tmp_path / "new", *loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_combinations_that_no_family_has_are_refused(tmp_path):
    config = DecoderConfig(8, 4, 1, 1, 1, 4, 4, qkv_bias=True)
    with pytest.raises(ValueError, match="no family has both"):
        huggingface.save(tmp_path / "new", *nnx.split(Decoder(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_loads_straight_onto_a_mesh_without_reading_matrices_whole(scan_layers, monkeypatch):
    sizes = []

    def tensors(folder, tensors=huggingface.shards.tensors):
        def recording(tensor):
            def read(index):
                sizes.append((tensor.read(index).size, np.prod(tensor.shape)))
                return tensor.read(index)

            return tensor._replace(read=read)

        return {name: recording(tensor) for name, tensor in tensors(folder).items()}

    monkeypatch.setattr(huggingface.shards, "tensors", tensors)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    asked = {}

    def sharding(path, shape):
        if path[-1] not in ("kernel", "embedding"):
            return None
        axes = ("tensor", "fsdp") if path[-2] in ("o_proj", "down_proj") else ("fsdp", "tensor")
        spec = jax.P(*(None,) * (len(shape) - 2), *axes)
        asked[path] = shape, jax.NamedSharding(mesh, spec)
        return asked[path][1]

    folder = DATA / "qwen3"
    graphdef, params = huggingface.load(folder, scan_layers=scan_layers, sharding=sharding)
    leaves = dict(nnx.to_flat_state(params))
    assert len(asked) == 1 + 7 * (1 if scan_layers else 2)
    for path, (shape, where) in asked.items():
        assert leaves[path].shape == shape
        assert leaves[path][...].sharding == where
    assert {whole // size for size, whole in sizes if whole > 16} == {8}
    _, whole = huggingface.load(folder, scan_layers=scan_layers)
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(whole))

    expected = np.load(folder / "expected.npz")
    inputs = jnp.asarray(expected["tokens"]), jnp.asarray(expected["whole_valid"])
    logits = logits_of(nnx.merge(graphdef, params), *inputs)
    np.testing.assert_allclose(logits, expected["whole_logits"], atol=1e-4)
