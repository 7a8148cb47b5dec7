"""The commands: what they refuse, and the figures they draw."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from experiments import (
    command_line,
    compare,
    configs,
    environment,
    evaluate,
    figures,
    files,
    methods,
    presets,
    records,
    sweep,
    train,
    training,
)
from tests.experiments import tiny

MODEL = pathlib.Path(__file__).parent / "models" / "data" / "qwen3"


def rows(offset: float):
    start = {"step": 0, "start_kl": 0.0, "cumulative_kl": 0.0, "validation": 0.5}
    later = [
        {
            "step": step,
            "step_kl": 1e-3 * (1 + offset),
            "start_kl": 1e-3 * step,
            "cumulative_kl": 1e-3 * (1 + offset) * step,
        }
        for step in range(1, 9)
    ]
    for row in later[3::4]:
        row["validation"] = 0.5 + 0.01 * row["step"]
    return [start, *later]


def test_figures_are_written(tmp_path):
    methods = ("grpo", "proma_accumulation")
    results = {method: [rows(i), rows(i + 0.5)] for i, method in enumerate(methods)}
    files = figures.draw(results, "addition", tmp_path / "figures")
    assert [file.name for file in files] == [
        "comparison.png",
        "step_kl.png",
        "start_kl.png",
        "validation.png",
        "score_against_kl.png",
    ]
    for file in files:
        pixels = image.imread(file)
        assert pixels.shape[1] >= 640
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 5


@pytest.mark.parametrize("module", [train, compare, sweep])
def test_help_explains_every_setting_and_says_where_results_go(module, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.read(module.Command, "prog", ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for setting in ("--training.method.rank", "--start.decoder.width", "--training.steps"):
        assert setting in shown
    assert "Responses sampled to each prompt" in shown
    assert "Results go" in shown


ACCUMULATION = "--method proma_accumulation"
REFUSED = [
    (f"{ACCUMULATION} {flags}", "".join(allowed))
    for flags, *allowed in [
        ("--seed -1", "must be greater than or equal to 0"),
        ("--seed 4294967296", "must be less than 4294967296"),
        ("--training.steps 0", "must be greater than or equal to 1"),
        ("--training.prompts -128", "must be greater than or equal to 1"),
        ("--training.group-size 1", "must be greater than or equal to 2"),
        ("--training.steps-per-batch 0", "must be greater than or equal to 1"),
        ("--training.microbatch-size 0", "must be greater than or equal to 1"),
        ("--training.validation-every 0", "must be greater than or equal to 1"),
        ("--training.checkpoint-every -1", "must be greater than or equal to 1"),
        ("--training.method.learning-rate nan", "must be a finite number"),
        ("--training.method.learning-rate inf", "must be a finite number"),
        ("--training.method.learning-rate 0.0", "must be greater than 0"),
        ("--training.method.max-gradient-norm 0.0", "must be greater than 0"),
        ("--training.method.clip 0.0", "must be greater than 0"),
        ("--training.method.clip 1.5", "must be less than 1"),
        ("--training.method.shrinkage 2.0", "must be less than or equal to 1"),
        ("--training.method.ridge -1.0", "must be greater than or equal to 0"),
        ("--training.method.relative-bound -1.0", "must be greater than or equal to 0"),
        ("--training.method.skip-fraction 1.5", "must be less than or equal to 1"),
        ("--training.method.rank 0", "must be greater than or equal to 1"),
        ("--start.target-accuracy 2.0", "must be less than or equal to 1"),
        ("--start.check-every 0", "must be greater than or equal to 1"),
        ("--start.max-steps 0", "must be greater than or equal to 1"),
        ("--start.batch-size 0", "must be greater than or equal to 1"),
        ("--start.learning-rate nan", "must be a finite number"),
        ("--start.max-gradient-norm -1.0", "must be greater than 0"),
        ("--start.seed -1", "must be greater than or equal to 0"),
        ("--prompt-tokens 0", "must be greater than or equal to 1"),
        ("--training.sampling.top-p 0.0", "must be greater than 0"),
        ("--training.sampling.temperature 0.0", "must be greater than 0"),
        ("--task-options digits", "must be NAME=VALUE"),
        ("--mesh 8", "must be 'data=N', 'fsdp=N' or 'data=N,fsdp=M'"),
        ("--mesh tensor=2", "must be 'data=N', 'fsdp=N' or 'data=N,fsdp=M'"),
        ("--mesh data=2,data=4", "must be 'data=N', 'fsdp=N' or 'data=N,fsdp=M'"),
        ("--data problems.jsonl", "and --reward None must be given together"),
        ("--start.decoder.layers 0", "must be greater than or equal to 1"),
        ("--start.decoder.kv-heads 0", "must be greater than or equal to 1"),
        ("--start.decoder.rope-theta 0.0", "must be greater than 0"),
        ("--start.decoder.norm-epsilon inf", "must be a finite number"),
        ("--start.decoder.head-dim 7", "must be even"),
        ("--start.decoder.heads 3", "must be a multiple of --start.decoder.kv-heads 2"),
        ("--start.decoder.vocab-size 5", "must be at least 14, the task's tokens, or 0"),
        ("--start.check-every 2001", "must be at most --start.max-steps 2000"),
        ("--start.batch-size 9489", "must be at most 9488, the task's training problems"),
        ("--training.prompts 9490", "must be at most 9488, the training problems of addition"),
        ("--training.validation-problems 513", "must be at most 512, the validation problems of"),
        ("--training.steps 3", "must be a multiple of --training.steps-per-batch 2"),
        ("--training.kl-sequences 1025", "must be at most 1024, the sequences of a rollout batch"),
        ("--training.prompts 127", "must be a multiple of --training.steps-per-batch 2"),
        ("--training.microbatch-size 7", "must divide the 512 sequences of an optimizer step"),
        ("--lora 49", "must be at most 48, the inputs or outputs of the narrowest matrix"),
        ("--lora-alpha 8.0", "needs the rank of adapters, --lora None"),
        ("--match elsewhere", f"with {ACCUMULATION}: grpo_matched needs the folder"),
    ]
]


@pytest.mark.parametrize(
    ("module", "flags", "told"),
    [
        *((train, flags, f"{flags.removeprefix(ACCUMULATION)} {told}") for flags, told in REFUSED),
        (train, "", "--method {reinforce,grpo,grpo_matched,proma_accumulation,proma_intra,"),
        (train, "--method ppo", "invalid choice 'ppo' for argument '--method'. Expected one of"),
        (train, "--method grpo --training.steps x", "--training.steps: invalid literal"),
        (train, "--method grpo --step 3", "Unrecognized options: --step"),
        (train, "--method grpo_matched", "--match None with --method grpo_matched"),
        (
            train,
            "--method grpo_matched --match no/where=3 --training.steps 2",
            "--match no/where=3 must be the folder of a run of --training.steps 2 steps or more",
        ),
        (
            train,
            "--method proma_intra --training.method.rank 49",
            "--training.method.rank 49 must be at most 48, ",
        ),
        (
            train,
            "--method proma_both --lora 4 --training.method.rank 5",
            "--training.method.rank 5 must be at most 4, the rank of the adapters",
        ),
        (
            train,
            "--method proma_intra --start.decoder.no-tied-head --training.method.rank 15",
            "--training.method.rank 15 must be at most 14, ",
        ),
        (evaluate, "--model m --problems 513", "--problems 513 must be at most 512, "),
        (
            train,
            "--method grpo --mesh data=16",
            "--training.microbatch-size 8 must be a multiple of 16, the devices of --mesh data=16",
        ),
        (
            compare,
            "--training.sequences-at-a-time 36 --mesh data=4,fsdp=2",
            "--training.sequences-at-a-time 36 must be a multiple of 8, the devices of --mesh ",
        ),
        (compare, "--training.method.rank 49", "--training.method.rank 49 must be at most 48, "),
        (compare, "--methods", "--methods () must have at least 1 item"),
        (compare, "--seeds", "--seeds () must have at least 1 item"),
        (compare, "--seeds 0 -3", "--seeds -3 must be greater than or equal to 0"),
        (compare, "--seeds 0 0", "--seeds (0, 0) must not name anything twice"),
        (compare, "--methods grpo grpo", "('grpo', 'grpo') must not name anything twice"),
        (compare, "--processes 2 --mesh data=2", "--processes 2 must be 1 with --mesh data=2"),
        (compare, "--methods grpo_matched", "must name proma_accumulation before grpo_matched"),
        (
            compare,
            "--methods grpo_matched proma_accumulation",
            "must name proma_accumulation before grpo_matched",
        ),
        (sweep, "--learning-rates 1e-3 0.0", "--learning-rates 0.0 must be greater than 0"),
        (sweep, "--variants", "--variants () must have at least 1 item"),
        (sweep, "--variants grpo grpo", "('grpo', 'grpo') must not name anything twice"),
        (sweep, "--variants ppo", "--variants ppo must begin with one of reinforce, grpo, proma_"),
        (sweep, "--variants grpo_matched", "--variants grpo_matched must begin with one of"),
        (sweep, "--variants grpo,rate=1", "--variants grpo,rate=1 must say SETTING=VALUE after"),
        (sweep, "--variants grpo,learning_rate=1", "with one of max_gradient_norm, clip, "),
        (sweep, "--variants grpo,clip=x", "grpo,clip=x must have a number, True, False or None as"),
        (
            sweep,
            "--variants grpo,clip=2",
            "--variants grpo,clip=2 is not allowed: clip must be less",
        ),
        (sweep, "--variants proma_intra,rank=49", "--training.method.rank 49 must be at most 48"),
    ],
)
def test_a_refusal_is_two_lines_with_flag_value_and_what_is_allowed(module, flags, told, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.read(module.Command, "prog", flags.split())
    assert ended.value.code == 2
    refusal, hint = capsys.readouterr().err.splitlines()
    assert refusal.startswith("error: ")
    assert told.strip() in refusal
    assert hint == "All settings: prog --help"


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (train, "--method grpo --seed 4294967295 --training.method.relative-bound None"),
        (train, "--method grpo --training.method.ridge 0 --training.method.rank 1000"),
        (train, "--method grpo --start.target-accuracy 0 --start.decoder.no-tied-head"),
        (train, "--method proma_intra --training.method.rank 48"),
        (compare, "--methods grpo --seeds 1"),
        (compare, "--methods proma_accumulation grpo_matched"),
        (sweep, "--variants proma_both,rank=48,fused=True grpo,relative_bound=None"),
    ],
)
def test_what_makes_sense_is_taken(module, flags):
    command_line.read(module.Command, "prog", flags.split())


def test_the_run_to_match_gives_as_many_norms_as_there_are_steps(tmp_path):
    rows = [{"step": step, "update_norm": step / 10} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--method", "grpo_matched", "--match", str(tmp_path), "--training.steps"]
    command = command_line.read(train.Command, "prog", [*flags, "4"])
    assert command.run_config().update_norms == (0.1, 0.2, 0.3, 0.4)
    with pytest.raises(SystemExit):
        command_line.read(train.Command, "prog", [*flags, "10"])


def test_compare_with_other_settings_goes_beside_and_comes_back(tmp_path):
    def compare_at(learning_rate):
        method = methods.MethodConfig(learning_rate=learning_rate)
        settings = configs.TrainingConfig(steps=2, prompts=4, microbatch_size=4, method=method)
        command = compare.Command(
            methods=("proma_accumulation", "grpo_matched"),
            seeds=(0,),
            directory=tmp_path / "runs",
            start_directory=tmp_path / "start",
            task=tiny.TASK,
            start=tiny.WARM,
            training=settings,
        )
        compare.main(command)

    def files():
        found = (tmp_path / "runs").glob("*/seed_*/*.json*")
        return {path: path.read_bytes() for path in found}

    compare_at(1e-3)
    first = files()
    compare_at(1e-2)
    second = files()
    assert second.items() > first.items()
    assert {path.parent.name for path in second.keys() - first.keys()} == {"seed_0-2"}
    for name in ("seed_0", "seed_0-2"):
        norms = [
            training.update_norms(records.read_metrics(tmp_path / "runs" / method / name))
            for method in ("proma_accumulation", "grpo_matched")
        ]
        np.testing.assert_allclose(*norms, rtol=1e-5)
    for learning_rate in (1e-3, 1e-2):
        compare_at(learning_rate)
        assert files() == second


def fail(command):
    raise files.Failure("the disk is full.")


def interrupt(command):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "status", "told"),
    [(fail, 1, "error: the disk is full."), (interrupt, 130, "Interrupted.")],
)
def test_what_ends_a_command_is_told_in_a_line(main, status, told, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        command_line.run(compare.Command, main, "prog")
    assert capsys.readouterr().err == f"{told}\n"
    assert ended.value.code == status


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        ("--seed -1", 2, "--seed -1 must be"),
        ("--directory file", 1, "file/grpo/seed_0 cannot be used: "),
        ("--start-directory file", 1, "file cannot be used: "),
    ],
)
def test_a_refusal_leaves_no_folder_behind(flags, status, told, tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "experiments.train", "--method", "grpo", *flags.split()]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_preset_stands_for_flags_and_flags_beside_it_win():
    flags = "--method grpo --preset reversal --start.decoder.layers 5 --training.steps 2"
    command = command_line.read(train.Command, "prog", flags.split())
    assert command.task.task == "reversal"
    assert command.start.decoder.layers == 5
    assert command.training.steps == 2


@pytest.mark.parametrize("name", [name for name in presets.PRESETS if "qwen3" not in name])
def test_presets_are_settings_of_all_commands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, tmp_path / "models" / "smollm2-135m-instruct")
    command_line.read(train.Command, "prog", ["--method", "grpo", "--preset", name])
    command_line.read(compare.Command, "prog", ["--preset", name])
    command_line.read(sweep.Command, "prog", ["--preset", name])


def test_a_runs_config_gives_its_settings_again(tmp_path):
    flags = (
        "--method proma_intra --seed 3 --task reversal --task-options length=4 letters=9 "
        "--no-remat --training.method.relative-bound None --start.decoder.no-tied-head"
    )
    config = command_line.read(train.Command, "prog", flags.split()).run_config()
    environment.describe(tmp_path, config)
    again = ["--config", str(tmp_path / "config.json")]
    assert command_line.read(train.Command, "prog", again).run_config() == config
    other = command_line.read(train.Command, "prog", [*again, "--seed", "4", "--remat"])
    assert other.run_config() == dataclasses.replace(
        config, seed=4, model=dataclasses.replace(config.model, remat=True)
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--preset", "none"], "There is no preset 'none', but: demo, addition, "),
        (["--config", "none.json"], "none.json cannot be used: "),
        (["--config"], " cannot be used: "),
    ],
)
def test_a_preset_or_config_that_is_not_there_is_named(flags, told):
    with pytest.raises(files.Failure, match=told):
        command_line.read(train.Command, "prog", flags)
