"""Models that transformers makes here and now, against ours; run by `make test-transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from flax import nnx

from experiments.models import huggingface
from tests.experiments.models import make_data
from tests.experiments.models.folders import DATA, assert_as_expected, logits_of


@pytest.mark.parametrize("family", make_data.CONFIGS)
def test_a_new_model_is_computed_as_transformers_does(tmp_path, family):
    make_data.write(family, tmp_path / family)
    loaded = huggingface.load(tmp_path / family, dtype="float32", scan_layers=True)
    assert_as_expected(*loaded, np.load(tmp_path / family / "expected.npz"))


@pytest.mark.parametrize("family", make_data.CONFIGS)
def test_the_committed_models_are_those_made_here(family):
    committed = transformers.AutoModelForCausalLM.from_pretrained(
        DATA / family, dtype=torch.float32
    )
    for (name, found), expected in zip(
        committed.named_parameters(), make_data.make(family).parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)


def test_the_committed_tokenizer_is_opened_by_transformers():
    theirs = transformers.AutoTokenizer.from_pretrained(DATA / "qwen3")
    ours = tokenizers.Tokenizer.from_file(str(DATA / "qwen3" / "tokenizer.json"))
    text = theirs.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 3?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert theirs(text).input_ids == ours.encode(text).ids
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", make_data.CONFIGS)
def test_what_is_saved_is_opened_by_transformers(tmp_path, family, scan_layers):
    graphdef, params = huggingface.load(DATA / family, scan_layers=scan_layers)
    params = jax.tree.map(lambda x: -x, params)
    new, source = tmp_path / "new", DATA / family
    huggingface.save(new, graphdef, params, source=source, max_shard_bytes=16_000)

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        new, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    original = transformers.AutoConfig.from_pretrained(source)
    assert type(model.config) is type(original)
    assert model.config.rope_parameters == original.rope_parameters
    loaded = huggingface.load(new, dtype="float32")
    assert_as_expected(*loaded, make_data.expect(model.eval()))


@pytest.mark.parametrize("family", make_data.CONFIGS)
def test_bfloat16_errs_about_as_much_as_that_of_transformers(tmp_path, family):
    model = make_data.make(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    theirs = make_data.expect(model)
    exact = make_data.expect(model.float())["padded_logits"]
    tokens, valid = theirs["tokens"], theirs["padded_valid"]
    ours = logits_of(
        nnx.merge(*huggingface.load(tmp_path)), jnp.asarray(tokens), jnp.asarray(valid)
    )
    assert ours.dtype == jnp.bfloat16
    errors = [
        np.std((np.asarray(logits, np.float32) - exact)[valid])
        for logits in (ours, theirs["padded_logits"])
    ]
    assert 0 < errors[0] < 2 * errors[1], errors
