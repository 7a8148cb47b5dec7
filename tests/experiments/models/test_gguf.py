"""GGUF files that the tests write from known folders, and what is made of them again."""

import json
import re

import gguf
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file

from experiments import command_line, files
from experiments.models import gguf as convert
from experiments.models import huggingface
from experiments.models.config import Llama3Rope
from experiments.models.decoder import Decoder, DecoderConfig, rotary_frequencies
from experiments.models.gguf_tokenizer import GGUFTokenizer
from tests.experiments.models.folders import DATA

SHAPE = {"vocab_size": 320, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 64}
CONFIGS = {
    "llama": DecoderConfig(
        **SHAPE,
        head_dim=8,
        qk_norm=False,
        rope_theta=500_000.0,
        rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
        norm_epsilon=1e-5,
    ),
    "qwen2": DecoderConfig(**SHAPE, head_dim=8, qk_norm=False, qkv_bias=True, tied_head=False),
    "qwen3": DecoderConfig(**SHAPE, head_dim=16, rope_theta=1e6),
}
TOKENIZER = json.loads((DATA / "qwen3" / "tokenizer.json").read_text())
NORMAL, CONTROL, USER_DEFINED, UNUSED = (
    gguf.TokenType[name] for name in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED")
)


def tokenizer_keys(pre="gpt-2", **others):
    """The keys of the committed tokenizer, its vocabulary filled up to 320 tokens."""
    tokens = sorted(TOKENIZER["model"]["vocab"], key=TOKENIZER["model"]["vocab"].get)
    types = [NORMAL] * len(tokens)
    for added in TOKENIZER["added_tokens"]:
        tokens.append(added["content"])
        types.append(CONTROL if added["special"] else USER_DEFINED)
    fill = range(len(tokens), 320)
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *(f"[PAD{i}]" for i in fill)],
        "token_type": [*map(int, types), *[int(UNUSED)] * len(fill)],
        "merges": [" ".join(merge) for merge in TOKENIZER["model"]["merges"]],
        "bos_token_id": tokens.index("<|endoftext|>"),
        "eos_token_id": tokens.index("<|im_end|>"),
        "padding_token_id": tokens.index("<|endoftext|>"),
    }
    return {key: value for key, value in (keys | others).items() if value is not None}


def alternating(weights, heads):
    """Rows of q_proj and k_proj as a llama's file has them: rotated pairs are adjacent."""
    return np.concatenate(
        [
            np.stack([head[: len(head) // 2], head[len(head) // 2 :]], axis=1).reshape(head.shape)
            for head in np.split(weights, heads)
        ]
    )


@pytest.fixture
def written(tmp_path):
    """Writes a random model to a folder and to a GGUF file of it, and gives both."""

    def write(architecture, kind=gguf.GGMLQuantizationType.F32, tokenizer=(), change=None, **keys):
        config = CONFIGS[architecture]
        graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
        huggingface.save(tmp_path / "source", graphdef, params)
        tensors = load_file(tmp_path / "source" / "model.safetensors")
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
        shape = {
            "block_count": config.layers,
            "context_length": 4096,
            "embedding_length": config.width,
            "feed_forward_length": config.hidden,
            "attention.head_count": config.heads,
            "attention.head_count_kv": config.kv_heads,
            "attention.layer_norm_rms_epsilon": config.norm_epsilon,
            "rope.freq_base": config.rope_theta,
            "rope.dimension_count": config.head_dim,
        }
        if architecture == "qwen3":
            shape |= {"attention.key_length": 16, "attention.value_length": 16}
        named = {f"{architecture}.{key}": value for key, value in shape.items()} | keys
        named |= {f"tokenizer.ggml.{k}": v for k, v in tokenizer_keys(**dict(tokenizer)).items()}
        named["tokenizer.chat_template"] = "{{ messages }}"
        for key, value in named.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)
        names = {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        }
        names |= {"model.layers": "blk", "self_attn.o_proj": "attn_output"}
        names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
        names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
        names |= {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
        names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
        its_name = re.compile("|".join(map(re.escape, names)))
        if config.rope_scaling is not None:
            plain = rotary_frequencies(DecoderConfig(head_dim=8, rope_theta=500_000.0))
            factors = np.asarray(plain / rotary_frequencies(config), np.float32)
            writer.add_tensor("rope_freqs.weight", factors)
        if change is not None:
            change(tensors)
        for name, weights in tensors.items():
            if architecture == "llama" and "q_proj" in name:
                weights = alternating(weights, config.heads)
            if architecture == "llama" and "k_proj" in name:
                weights = alternating(weights, config.kv_heads)
            other_name = its_name.sub(lambda match: names[match[0]], name)
            if weights.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
                writer.add_tensor(other_name, gguf.quantize(weights, kind), raw_dtype=kind)
            else:
                writer.add_tensor(other_name, weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "source", tmp_path / "model.gguf"

    return write


@pytest.mark.parametrize("architecture", CONFIGS)
def test_folder_is_the_one_that_the_file_was_made_from(written, tmp_path, architecture):
    source, file = written(architecture)
    convert.convert(file, tmp_path / "new")
    assert huggingface.config_of(tmp_path / "new") == CONFIGS[architecture]
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "new", source))
    assert set(found) == set(expected)
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights, err_msg=name)
    huggingface.load(tmp_path / "new")

    config, generation, settings = (
        json.loads((tmp_path / "new" / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert config["max_position_embeddings"] == settings["model_max_length"] == 4096
    assert generation == {"bos_token_id": 300, "eos_token_id": [302], "pad_token_id": 300}
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_what_they_stand_for(written, tmp_path, kind, dtype):
    kind = gguf.GGMLQuantizationType[kind]
    source, file = written("qwen3", kind)
    convert.convert(file, tmp_path / "new", dtype)
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "new", source))
    for name, weights in expected.items():
        if weights.ndim == 2:
            weights = gguf.dequantize(gguf.quantize(weights, kind), kind)
        np.testing.assert_array_equal(found[name], weights.astype(dtype), err_msg=name)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("qwen3", {"qwen3.attention.sliding_window": 512}, "sliding_window=512 is not supported"),
        ("qwen3", {"qwen3.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn' .* 'none'"),
        ("qwen3", {"qwen3.attention.value_length": 8}, "value_length=8"),
        ("qwen3", {"qwen3.embedding_length": None}, "qwen3.embedding_length is missing"),
        (
            "qwen3",
            {"qwen3.embedding_length": 64},
            r"should have \(32, 64\)",
        ),
        ("qwen3", {"qwen3.attention.head_count_kv": 3}, "kv_heads=3"),
        ("qwen3", {"split.count": 2}, "one of several"),
        ("qwen3", {"tokenizer": {"pre": "tekken"}}, "pre='tekken' is not supported"),
        (
            "llama",
            {"change": lambda t: t.update(other=t["model.norm.weight"])},
            "other is no tensor",
        ),
        (
            "llama",
            {"change": lambda t: t.pop("model.norm.weight")},
            "output_norm.weight is missing",
        ),
        ("llama", {"llama.rope.freq_base": 1e4}, "rope_freqs.weight is not that of a Llama 3"),
    ],
)
def test_what_is_not_known_is_refused_by_name(written, tmp_path, architecture, changes, message):
    _, file = written(architecture, **changes)
    with pytest.raises(files.Failure, match=message):
        convert.convert(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_command_says_what_it_wrote_or_why_not(written, tmp_path, monkeypatch, capsys):
    _, file = written("qwen3")
    monkeypatch.setattr(
        "sys.argv", ["gguf", str(file), str(tmp_path / "new"), "--dtype", "bfloat16"]
    )
    command_line.run(convert.Command, convert.main, "gguf")
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'new'}\n"
    assert huggingface.config_of(tmp_path / "new").dtype == "bfloat16"
    with pytest.raises(SystemExit):
        command_line.run(convert.Command, convert.main, "gguf")
    assert "new is there already" in capsys.readouterr().err


def test_other_architectures_and_other_files_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "text").write_text("no model, but longer than a header")
    for name, message in {
        "gemma.gguf": "general.architecture='gemma3' is not supported",
        "text": "text is no GGUF file",
        "none": "No such file",
    }.items():
        with pytest.raises(files.Failure, match=message):
            convert.convert(tmp_path / name, tmp_path / "new")


def test_tokenizer_encodes_as_the_one_it_was_written_from():
    expected = tokenizers.Tokenizer.from_file(str(DATA / "qwen3" / "tokenizer.json"))
    found = GGUFTokenizer(tokenizer_keys(), None).build()
    text = "<|im_start|>user\nWhat's 12 + 30?\n\n  Naïve 日本 <think>7</think><|im_end|>\n"
    assert found.encode(text).ids == expected.encode(text).ids
    assert found.decode(found.encode(text).ids) == expected.decode(found.encode(text).ids)
    assert found.get_vocab() == expected.get_vocab()
    assert found.get_vocab_size() == 305


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["WE", "'", "LL", "Ġ1234", "!", "ĊĊĠĠ", "Ġa", "!", "Ċ"]),
        ("smollm", ["WE", "'", "LL", "Ġ", "1", "2", "3", "4", "!", "ĊĊĠĠ", "Ġa", "!", "Ċ"]),
        ("qwen2", ["WE", "'LL", "Ġ", "1", "2", "3", "4", "!ĊĊ", "ĠĠ", "Ġa", "!Ċ"]),
        ("llama-bpe", ["WE", "'LL", "Ġ", "123", "4", "!ĊĊ", "ĠĠ", "Ġa", "!Ċ"]),
    ],
)
def test_text_is_split_as_the_models_split_it(pre, pieces):
    tokenizer = GGUFTokenizer(tokenizer_keys(pre), None).build()
    found = tokenizer.pre_tokenizer.pre_tokenize_str("WE'LL 1234!\n\n   a!\n")
    assert [piece for piece, _ in found] == pieces


def test_first_tokens_are_added_where_the_file_asks_for_them():
    def ids(**keys):
        return GGUFTokenizer(tokenizer_keys(**keys), None).build().encode("a").ids

    plain = ids(pre="qwen2")
    assert ids(pre="llama-bpe", add_bos_token=False) == plain
    assert ids(pre="llama-bpe") == ids(pre="qwen2", add_bos_token=True) == [300, *plain]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, "model='llama' is not supported"),
        ({"eos_token_id": None}, "eos_token_id is missing"),
        ({"add_eos_token": True}, "add_eos_token=True"),
        ({"precompiled_charsmap": 1}, "precompiled_charsmap is not known"),
        ({"token_type": [1]}, "token_type has 1 entries for 320 tokens"),
        ({"token_type": [6] * 320}, "is of the type 6"),
        ({"tokens": ["a"] * 320}, "tokens has one of them twice"),
        ({"merges": ["x yz"]}, "merges do not fit the tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, "bos_token_id is missing"),
        ({"eos_token_id": 310}, "eos_token_id=310 is no token"),
    ],
)
def test_tokenizers_that_are_not_known_are_refused(change, message):
    with pytest.raises(files.Failure, match=message):
        GGUFTokenizer(tokenizer_keys(**change), None).build()
