"""Tiny models of three families as transformers makes them, with what it computes from them.

    python -m tests.experiments.models.make_data FOLDER

writes one folder for each family: the model, and expected.npz with inputs, logits and greedy
continuations. Those in data/ were made so; needs torch and transformers (`make test-transformers`).
"""

import copy
import json
import pathlib
import sys

import numpy as np
import tokenizers
import torch
import transformers

CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=24,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        bos_token_id=0,
        eos_token_id=1,
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=32,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "qwen3": transformers.Qwen3Config(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    ),
}
SHARD_SIZES = {"llama": "24KB"}
DTYPES = {"qwen2": torch.bfloat16}
TEXT = """What is 12 + 30? The answer is 42. The sum of two numbers is the answer to the question.
<|im_start|>user
How many apples are there? There are 7 apples.<|im_end|>
<|im_start|>assistant
The answer is 7.<|im_end|>
"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
CONTINUATION = 8


def make(family: str) -> transformers.PreTrainedModel:
    """A model whose every parameter is random, rounded to the dtype that it will be saved in."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=2 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3)
            if "norm" in name:
                parameter.add_(1)
            parameter.copy_(parameter.to(DTYPES.get(family, torch.float32)))
    return model.eval()


def expect(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Inputs, unpadded and left-padded, and what the model makes of them."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(2, model.config.vocab_size, size=(2, 10))
    expected = {"tokens": tokens.astype(np.int32)}
    for name, pads in {"whole": [0, 0], "padded": [2, 6]}.items():
        valid = np.arange(10) >= np.array(pads)[:, None]
        ids = torch.from_numpy(tokens)
        mask = torch.from_numpy(valid.astype(np.int64))
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
            settings = transformers.GenerationConfig(
                do_sample=False, max_new_tokens=CONTINUATION, pad_token_id=0
            )
            continued = model.generate(ids, attention_mask=mask, generation_config=settings)
        expected |= {f"{name}_valid": valid, f"{name}_logits": logits.float().numpy()}
        expected[f"{name}_continued"] = continued[:, 10:].numpy().astype(np.int32)
    return expected


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE as Qwen's, with three special tokens and two added ones."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def write(family: str, folder: pathlib.Path) -> None:
    """Writes a model, and for Qwen3 its tokenizer, beside what is expected of it."""
    model = make(family)
    expected = expect(model)
    if family in DTYPES:
        model = model.to(DTYPES[family])
    model.save_pretrained(folder, max_shard_size=SHARD_SIZES.get(family, "1GB"))
    np.savez_compressed(folder / "expected.npz", **expected)
    if family == "qwen3":
        tokenizer = make_tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        endoftext, _, im_end = map(tokenizer.token_to_id, SPECIAL)
        contents = {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
            },
            "generation_config.json": {
                "eos_token_id": [im_end, endoftext],
                "pad_token_id": endoftext,
            },
        }
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    for family in CONFIGS:
        write(family, pathlib.Path(sys.argv[1]) / family)
