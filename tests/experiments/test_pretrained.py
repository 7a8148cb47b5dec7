"""From a model folder, a task and a method to a trained model folder, by the commands."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import configs, evaluate, files, generate, methods, sampling, starts, train
from experiments.models import huggingface
from experiments.models.pretrained_tokens import Pretrained
from experiments.models.settings import ModelConfig
from experiments.tasks.settings import TaskConfig
from experiments.tasks.task import Problem

FOLDER = pathlib.Path(__file__).parent / "models" / "data" / "qwen3"
CHAT = [{"role": "user", "content": "What is 2 plus 3?"}]


def test_a_chat_reads_as_the_template_says_up_to_the_answer():
    tokenizer = Pretrained(FOLDER)
    assert tokenizer.chat_text(CHAT) == (
        "<|im_start|>user\nWhat is 2 plus 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokenizer.encode(CHAT)) == "user\nWhat is 2 plus 3?\nassistant\n"
    assert tokenizer.encode(CHAT).count(tokenizer.ends[0]) == 1  # <|im_end|> is one token


def folder_with(tmp_path, **changes):
    """The model folder's tokenizer, with some of its files changed, or left out where None."""
    for path in FOLDER.glob("*.json"):
        content = changes.get(path.stem, path.read_text())
        if content is not None:
            (tmp_path / path.name).write_text(content)
    return tmp_path


def test_end_tokens_are_the_generation_configs_or_else_the_models(tmp_path):
    ends = json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]
    assert Pretrained(FOLDER).ends == tuple(ends)
    one = folder_with(tmp_path, generation_config="{}", config='{"eos_token_id": 7}')
    assert Pretrained(one).ends == (7,)
    none = folder_with(tmp_path, generation_config="{}", config="{}")
    with pytest.raises(files.Failure, match="names no end token"):
        Pretrained(none)


def test_a_chat_without_a_template_and_one_that_it_refuses_are_named(tmp_path):
    settings = json.loads((FOLDER / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    del settings["chat_template"]
    without = folder_with(tmp_path, tokenizer_config=json.dumps(settings))
    with pytest.raises(files.Failure, match="has no chat template"):
        Pretrained(without).encode(CHAT)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system, please') }}")
    with pytest.raises(files.Failure, match=r"refuses .*no system, please"):
        Pretrained(without).encode(CHAT)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(files.Failure, match=r"refuses .*unsafe"):
        Pretrained(without).encode(CHAT)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(files.Failure, match=r"tokenizer\.json is not there"):
        Pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logprobs_at_sampling_are_those_of_a_full_forward(dtype):
    policy, params = starts.pretrained(
        ModelConfig(FOLDER, prompt_tokens=64, response_tokens=16, dtype=dtype)
    )
    policy = policy._replace(config=sampling.SamplingConfig(temperature=0.7))
    rollouts = sampling.respond(policy, params, [CHAT, "What", "2 plus"], jax.random.key(0))
    expected = sampling.response_logprobs(policy, params, rollouts)
    chex.assert_trees_all_close(
        rollouts.logprobs, expected, atol=1e-4 if dtype == "float32" else 0.1
    )


def logprobs_and_gradient(**settings):
    policy, params = starts.pretrained(
        ModelConfig(FOLDER, prompt_tokens=32, response_tokens=8, **settings)
    )
    rollouts = sampling.respond(policy, params, [CHAT, "What is"], None)

    def total(params):
        return jnp.sum(sampling.response_logprobs(policy, params, rollouts))

    value, gradient = jax.value_and_grad(total)(params)
    blocks = gradient["blocks"]
    if not settings["scan_layers"]:
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks.values())
    return value, [*jax.tree.leaves(gradient["embed"]), *jax.tree.leaves(blocks)]


def test_scanning_rematerialising_and_chunks_of_logits_change_nothing():
    expected = logprobs_and_gradient(scan_layers=False, remat=False)
    found = logprobs_and_gradient(scan_layers=True, remat=True, logits_at_a_time=3)
    chex.assert_trees_all_close(found, expected, atol=2e-4, rtol=1e-4)


class Vowels:
    """Rewards the share of vowels in a response, which varies for an untrained model too."""

    training = Problem(CHAT), Problem("How are you?"), Problem("a"), Problem("What is 2?")
    validation = training[:2]

    def grade(self, problems, responses):
        vowels = [sum(letter in "aeiou" for letter in response) for response in responses]
        return {
            "reward": [n / max(len(r), 1) for n, r in zip(vowels, responses, strict=True)],
            "vowels": vowels,
        }


def trained(method, tmp_path, **settings):
    command = train.Command(
        method=method,
        directory=tmp_path / "runs",
        save_model=tmp_path / "model",
        task=TaskConfig(f"{__name__}:Vowels"),
        model=ModelConfig(FOLDER, prompt_tokens=64, response_tokens=6),
        training=configs.TrainingConfig(
            steps=2,
            prompts=4,
            group_size=2,
            microbatch_size=2,
            sequences_at_a_time=3,
            kl_sequences=4,
            method=methods.MethodConfig(learning_rate=1e-3, skip_fraction=0.0),
            **settings,
        ),
    )
    train.main(command)
    return command


def rows_of(command):
    [path] = command.directory.glob("*/seed_0/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["grpo", "proma_accumulation"])
def test_a_model_is_trained_on_a_task_and_saved(method, tmp_path, capsys):
    command = trained(method, tmp_path)
    rows = rows_of(command)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0].keys() >= {"validation", "validation_vowels"}
    assert rows[1].keys() >= {"reward", "rollout_vowels", "response_tokens", "cut_off"}
    assert Pretrained(tmp_path / "model").encode(CHAT) == Pretrained(FOLDER).encode(CHAT)
    before, after = (
        nnx.to_pure_dict(huggingface.load(folder)[1]) for folder in (FOLDER, tmp_path / "model")
    )
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert all(jax.tree.leaves(changed))
    assert str(tmp_path / "model") in capsys.readouterr().out.replace("\n", "")


def test_a_folder_in_use_is_refused_before_training(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").touch()
    with pytest.raises(files.Failure, match="is there already"):
        trained("grpo", tmp_path)
    assert not (tmp_path / "runs").exists()


def test_generate_prints_one_response_for_each_prompt_and_sample(capsys):
    generate.main(
        generate.Command(
            FOLDER, ("What is 2?", "Hello"), samples=2, max_tokens=5, json=True, system="Be short."
        )
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["What is 2?"] * 2 + ["Hello"] * 2
    assert all(line["logprob"] < 0 and 1 <= line["tokens"] <= 5 for line in lines)
    assert len({line["response"] for line in lines}) > 1
    generate.main(generate.Command(FOLDER, ("2 plus",), text=True, greedy=True, max_tokens=5))
    assert "[cut off at 5 tokens]" in capsys.readouterr().out


def test_evaluate_keeps_every_response_and_never_overwrites(tmp_path, capsys):
    command = evaluate.Command(
        FOLDER,
        task=TaskConfig("arithmetic", ("validation_problems=5",)),
        response_tokens=4,
        at_a_time=2,
        directory=tmp_path,
    )
    for name in ("arithmetic", "arithmetic-2"):
        evaluate.main(command)
        lines = (tmp_path / name / "responses.jsonl").read_text().splitlines()
        graded = [json.loads(line) for line in lines]
        assert len(graded) == 5
        assert all(line.keys() >= {"prompt", "response", "reward", "format"} for line in graded)
        means = json.loads((tmp_path / name / "means.json").read_text())
        assert means["reward"] == pytest.approx(np.mean([line["reward"] for line in graded]))
        assert "git_commit" in (tmp_path / name / "environment.json").read_text()
    assert "of 5" in capsys.readouterr().out
