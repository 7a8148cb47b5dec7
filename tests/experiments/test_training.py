"""Every method end to end on a tiny decoder, and what interruptions may not change."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    batches,
    configs,
    files,
    methods,
    records,
    sampling,
    training,
    validation,
    warm_start,
)
from experiments.tasks.task import Problem
from tests.experiments import tiny
from tests.experiments.tiny import START

TRAINING = configs.TrainingConfig(
    steps=6,
    prompts=8,
    group_size=4,
    microbatch_size=4,
    validation_every=2,
    checkpoint_every=2,
    method=methods.MethodConfig(learning_rate=3e-3, relative_bound=None, skip_fraction=0.0),
)
METRICS = {
    "step",
    "reward",
    "step_kl",
    "start_kl",
    "cumulative_kl",
    "entropy",
    "gradient_norm",
    "update_norm",
    "accumulation_fraction",
    "intra_fraction",
    "seconds",
}


def config_of(method, **changes):
    return tiny.run_config(method, TRAINING, **changes)


def start_config(**changes):
    return warm_start.StartConfig(tiny.TASK, dataclasses.replace(tiny.WARM, **changes))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A policy that is right often enough for rewards to vary."""
    return warm_start.warm_start(START, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    metrics = {}
    for method in ("reinforce", "grpo", "proma_accumulation", "proma_intra", "proma_both"):
        metrics[method] = training.train(config_of(method), *start, root / method)
    norms = training.update_norms(metrics["proma_accumulation"])
    matched = config_of("grpo_matched", update_norms=norms)
    metrics["grpo_matched"] = training.train(matched, *start, root / "grpo_matched")
    return metrics


def without_seconds(rows):
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


def test_every_step_is_logged_whole(runs):
    for rows in runs.values():
        assert [row["step"] for row in rows] == list(range(7))
        assert [row["step"] for row in rows if "validation" in row] == [0, 2, 4, 6]
        for row in rows[1:]:
            assert row.keys() >= METRICS
            assert all(np.isfinite(value) for value in row.values())
            assert row["step_kl"] > 0
            assert row["update_norm"] > 0
        np.testing.assert_allclose(
            [row["cumulative_kl"] for row in rows[1:]],
            np.cumsum([row["step_kl"] for row in rows[1:]]),
            rtol=1e-5,
        )
        assert rows[1]["start_kl"] > 0


def test_all_methods_begin_with_the_same_rollouts(runs):
    assert len({rows[1]["reward"] for rows in runs.values()}) == 1
    assert len({rows[0]["validation"] for rows in runs.values()}) == 1


def test_methods_differ(runs):
    assert len({rows[2]["step_kl"] for rows in runs.values()}) == len(runs)


def test_grpo_starts_as_reinforce_because_the_policy_is_still_the_one_that_sampled(runs):
    np.testing.assert_allclose(
        runs["grpo"][1]["gradient_norm"], runs["reinforce"][1]["gradient_norm"], rtol=1e-4
    )


def test_only_proma_projects(runs):
    for method, rows in runs.items():
        for variant in ("accumulation", "intra"):
            removes = {row[f"{variant}_fraction"] > 0 for row in rows[1:]}
            assert removes == {method in (f"proma_{variant}", "proma_both")}


def test_matched_updates_have_the_norms_of_the_other_run(runs):
    np.testing.assert_allclose(
        [row["update_norm"] for row in runs["grpo_matched"][1:]],
        [row["update_norm"] for row in runs["proma_accumulation"][1:]],
        rtol=1e-5,
    )


@pytest.mark.parametrize("method", ["proma_accumulation", "proma_intra"])
def test_proma_without_shrinkage_is_reinforce(method, start, runs, tmp_path):
    unshrunk = dataclasses.replace(TRAINING.method, shrinkage=0.0)
    settings = dataclasses.replace(TRAINING, steps=2, method=unshrunk)
    rows = training.train(tiny.run_config(method, settings), *start, tmp_path)
    for row, expected in zip(rows[1:], runs["reinforce"][1:3], strict=True):
        for key in ("gradient_norm", "update_norm", "step_kl", "entropy"):
            np.testing.assert_allclose(row[key], expected[key], rtol=1e-3)


@pytest.mark.parametrize("method", ["proma_accumulation", "proma_intra", "proma_both"])
def test_the_fused_form_trains_alike(method, start, tmp_path):
    def train(fused):
        settings = dataclasses.replace(TRAINING, steps=2, prompts=4)
        settings = dataclasses.replace(
            settings, method=dataclasses.replace(settings.method, fused=fused)
        )
        directory = tmp_path / f"fused_{fused}"
        return training.train(tiny.run_config(method, settings), *start, directory)

    for row, expected in zip(train(fused=True)[1:], train(fused=False)[1:], strict=True):
        for key in ("gradient_norm", "update_norm", "accumulation_fraction", "intra_fraction"):
            np.testing.assert_allclose(row[key], expected[key], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["reinforce", "proma_accumulation", "proma_intra"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(method, start, runs, tmp_path):
    def interrupt(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(config_of(method), *start, tmp_path, on_row=interrupt)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    rows = training.train(config_of(method), *start, tmp_path)
    assert without_seconds(rows) == without_seconds(runs[method])


@pytest.mark.parametrize("method", ["grpo", "proma_accumulation", "proma_intra"])
def test_a_run_stopped_again_and_again_ends_like_an_uninterrupted_one(
    method, start, runs, tmp_path
):
    def stop_at(question):
        answers = itertools.chain([False] * question, [True])
        return lambda: next(answers)

    stops = 0
    for question in itertools.chain([0], itertools.repeat(1)):
        with contextlib.suppress(records.Preempted):
            rows = training.train(config_of(method), *start, tmp_path, stopping=stop_at(question))
            break
        stops += 1
    assert stops == 6
    assert without_seconds(rows) == without_seconds(runs[method])


def test_a_finished_run_is_taken_as_it_is(start, runs, tmp_path):
    rows = training.train(config_of("grpo"), *start, tmp_path)
    assert without_seconds(rows) == without_seconds(runs["grpo"])
    again = training.train(
        config_of("grpo"), *start, tmp_path, on_row=lambda row: pytest.fail("ran again")
    )
    assert again == rows


def infinite_parameters(params, opt_state, lengths):
    return jax.tree.map(lambda x: x / 0, params), opt_state, lengths


def infinite_optimizer_state(params, opt_state, lengths):
    return params, optax.tree.set(opt_state, gradient_norm=jnp.float32(jnp.inf)), lengths


def nan_gradient(params, opt_state, lengths):
    return params, opt_state, lengths | {"gradient_norm": jnp.nan}


@pytest.mark.parametrize("poison", [infinite_parameters, infinite_optimizer_state, nan_gradient])
def test_a_run_that_diverges_stops_there_unfinished(poison, start, tmp_path, monkeypatch):
    def train():
        return training.train(config_of("reinforce"), *start, tmp_path)

    update = training.update

    def poisoned(*arguments):
        return poison(*update(*arguments)) if next(steps) >= 5 else update(*arguments)

    poisoned.lower = update.lower
    monkeypatch.setattr(training, "update", poisoned)
    for first in (1, 5):
        steps = itertools.count(first)
        with pytest.raises(files.Failure, match=r"Step 5 gave .* unfinished, with checkpoint 4"):
            train()
        assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["4"]
        assert [row["step"] for row in records.read_metrics(tmp_path)] == list(range(6))
    monkeypatch.undo()
    assert train()[-1]["step"] == 6


def test_a_warm_start_that_diverges_stops_there(tmp_path):
    config = start_config(learning_rate=1e30)
    with pytest.raises(files.Failure, match=r"Step \d+ gave .* with no checkpoint"):
        warm_start.warm_start(config, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_directory_does_not_mix_settings(start, tmp_path):
    training.train(config_of("grpo"), *start, tmp_path)
    faster = dataclasses.replace(TRAINING.method, learning_rate=1.0)
    other = dataclasses.replace(TRAINING, method=faster)
    with pytest.raises(
        records.OtherSettings, match=r"training\.method\.learning_rate: 0\.003 there, 1\.0 now"
    ):
        records.Run(tmp_path, tiny.run_config("grpo", other))


@pytest.fixture
def compiled():
    """How often each program has been compiled since the test began."""
    names = collections.Counter()

    def count(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names[about["fun_name"]] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    yield names
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize("method", ["reinforce", "proma_accumulation", "proma_intra"])
def test_only_the_first_step_compiles_and_it_is_not_timed(method, compiled, tmp_path, monkeypatch):
    settings = dataclasses.replace(TRAINING, validation_every=1)
    config = tiny.run_config(method, settings)
    warm_start.warm_start(START, tmp_path / "start")

    def train(until):
        policy, params = warm_start.warm_start(START, tmp_path / "start")
        uncommitted = jax.tree.map(np.asarray, params)
        jax.clear_caches()
        compiled.clear()
        counts, clock = {}, []

        def perf_counter():
            clock.append(compiled.total())
            return float(len(clock))

        def on_row(row):
            counts[row["step"]] = compiled.total()

        monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=perf_counter))
        with contextlib.suppress(records.Preempted):
            training.train(
                config,
                policy,
                uncommitted,
                tmp_path / "run",
                on_row=on_row,
                stopping=lambda: until in counts,
            )
        assert clock[0::2] == clock[1::2]
        for name in ("update", "_hidden", "_divergences"):
            assert compiled[f"jit({name})"] == 1
        return counts

    fresh, resumed = train(until=2), train(until=6)
    assert list(fresh) == [0, 1, 2]
    assert fresh[1] == fresh[2]
    assert list(resumed) == [3, 4, 5, 6]
    assert len(set(resumed.values())) == 1


def changed(config, **settings):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **settings))


@pytest.mark.parametrize("validation_every", [2, 4])
def test_a_finished_run_that_is_asked_for_more_steps_goes_on(validation_every, start, tmp_path):
    longer = changed(config_of("grpo"), validation_every=validation_every)
    expected = training.train(longer, *start, tmp_path / "expected")
    shorter, directory = changed(longer, steps=2), tmp_path / "extended"
    assert training.train(shorter, *start, directory)[-1]["validation"] >= 0
    rows = training.train(longer, *start, directory)
    assert without_seconds(rows) == without_seconds(expected)
    assert rows == records.read_metrics(directory)
    assert [row["step"] for row in rows if "validation" in row] == [
        *range(0, 6, validation_every),
        6,
    ]


def test_a_matched_run_goes_on_with_the_run_that_it_matches(start, runs, tmp_path):
    norms = training.update_norms(runs["proma_accumulation"])
    two_steps = dataclasses.replace(TRAINING, steps=2)
    shorter = tiny.run_config("grpo_matched", two_steps, update_norms=norms[:2])
    training.train(shorter, *start, tmp_path / "run")
    longer = config_of("grpo_matched", update_norms=norms)
    rows = training.train(longer, *start, tmp_path / "run")
    assert without_seconds(rows) == without_seconds(runs["grpo_matched"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "settings",
    [{"steps": 4}, {"checkpoint_every": 3}, {"method": methods.MethodConfig(learning_rate=1e-3)}],
)
def test_a_run_with_other_settings_goes_beside(settings, start, runs, tmp_path):
    config, directory = config_of("grpo"), tmp_path / "run"
    training.train(config, *start, directory)
    files = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    opened = []

    def train(config):
        def on_open(run, finished):
            opened.append((run.directory.name, finished, run.passed))

        return training.train(config, *start, directory, on_open=on_open)

    third = dataclasses.replace(config, seed=1)
    others = [train(changed(config, **settings)), train(third)]
    again = [train(changed(config, **settings)), train(third)]
    assert again == others
    names, finished, passed = zip(*opened, strict=True)
    assert names == ("run-2", "run-3", "run-2", "run-3")
    assert finished == (False, False, True, True)
    assert f"{directory} holds a run with other settings (training." in passed[0][0]
    assert [len(messages) for messages in passed] == [1, 2, 1, 2]
    assert {path: path.read_bytes() for path in files} == files


def test_a_start_that_failed_keeps_its_folder_free(start, tmp_path, monkeypatch):
    config, directory = config_of("grpo"), tmp_path / "run"

    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(batches, "collect", fail)
        with pytest.raises(MemoryError):
            training.train(config, *start, directory)
    assert (directory / "config.json").exists()
    assert records.read_metrics(directory)
    training.train(changed(config, steps=4), *start, directory)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_in_progress_with_other_settings_is_not_waited_for(start, tmp_path, caplog):
    config, directory = config_of("grpo"), tmp_path / "run"
    beside = []

    def is_waiting():
        return "waiting" in caplog.text

    def train_another(row):
        if row["step"] == 1:
            other = changed(config, steps=2)
            beside.append(training.train(other, *start, directory, stopping=is_waiting))

    training.train(config, *start, directory, on_row=train_another)
    assert beside[0] == records.read_metrics(tmp_path / "run-2")


def test_a_minibatch_holds_whole_groups_spread_over_microbatches(start):
    config = config_of("grpo")
    rollouts = batches.collect(config, *start, batch=0)
    batch = batches.divide(config, start[0], rollouts, batch=0)
    assert 0 < batch.described["reward"] < 1
    assert 2 <= batch.described["response_tokens"] <= 3
    assert len(batch.minibatches) == 2
    tokens = []
    for microbatches in batch.minibatches:
        chex.assert_shape(microbatches.coefficients, (4, 4))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), microbatches)
        tokens.append(flat.rollouts.tokens)
        prompts = flat.rollouts.tokens[:, : start[0].prompt_width]
        groups = np.unique(prompts, axis=0, return_inverse=True)[1]
        assert np.bincount(groups).tolist() == [4] * 4
        assert any(len(set(groups[i : i + 4])) > 1 for i in range(0, 16, 4))
        for group in range(4):  # advantages are relative to the group
            assert abs(flat.coefficients[groups == group].sum()) < 1e-6
    together = np.concatenate(tokens)
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(rollouts.tokens, axis=0))


def test_weights_are_the_advantages_over_the_minibatch_tokens(start):
    config = config_of("grpo")
    rollouts = batches.collect(config, *start, batch=0)
    microbatches, _ = batches.divide(config, start[0], rollouts, batch=0).minibatches
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), microbatches)
    prompts = flat.rollouts.tokens[:, : start[0].prompt_width]
    groups = np.unique(prompts, axis=0, return_inverse=True)[1]
    problems = [Problem(start[0].tokenizer.decode(row[row > 1])) for row in prompts]
    responses = sampling.texts(start[0], flat.rollouts)
    rewards = np.array(config.task.made.grade(problems, responses)["reward"])
    for group in range(4):
        r = rewards[groups == group]
        expected = -(r - r.mean()) / (r.std(ddof=1) + 1e-6) / flat.rollouts.mask.sum()
        np.testing.assert_allclose(flat.coefficients[groups == group], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5}, "steps=5"),
        ({"prompts": 7}, "prompts=7"),
        ({"microbatch_size": 5}, "microbatch_size=5"),
    ],
)
def test_batches_that_do_not_divide_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **settings)


def test_matched_runs_need_norms():
    with pytest.raises(ValueError, match="update_norms"):
        config_of("grpo_matched")


def test_warm_start_is_reused_and_reaches_its_target(tmp_path):
    config = start_config(target_accuracy=0.1, check_every=25)
    policy, params = warm_start.warm_start(config, tmp_path)
    reached = validation.scores(policy, params, config.task.made)["validation"]
    assert reached >= 0.1
    assert records.read_metrics(tmp_path)[-1]["validation"] == pytest.approx(reached)
    again = warm_start.warm_start(config, tmp_path, lambda row: pytest.fail("trained again"))
    chex.assert_trees_all_equal(again[1], params)


def test_damage_to_what_is_finished_is_named_too(start, tmp_path):
    work = {
        "start": functools.partial(warm_start.warm_start, START),
        "run": functools.partial(training.train, config_of("grpo"), *start),
    }
    for name, go_on in work.items():
        go_on(tmp_path / name)
        (tmp_path / name / "metrics.jsonl").unlink()
        with pytest.raises(files.Failure, match=f"{name}/metrics.jsonl is damaged: 0 rows"):
            go_on(tmp_path / name)


def test_a_warm_start_that_falls_short_is_an_error(tmp_path):
    config = start_config(target_accuracy=1.0, max_steps=2, check_every=1)
    with pytest.raises(files.Failure, match="after 2 steps"):
        warm_start.warm_start(config, tmp_path)


def test_a_warm_start_that_fell_short_goes_on_when_it_is_given_more_steps(tmp_path):
    config = start_config(target_accuracy=0.1, check_every=25)
    expected = warm_start.warm_start(config, tmp_path / "expected")
    steps = records.read_metrics(tmp_path / "expected")[-1]["step"]
    short = start_config(target_accuracy=0.1, check_every=25, max_steps=steps - 1)
    with pytest.raises(files.Failure, match=f"after {steps - 1} steps"):
        warm_start.warm_start(short, tmp_path / "start")
    chex.assert_trees_all_equal(warm_start.warm_start(config, tmp_path / "start"), expected)
    rows = map(records.read_metrics, (tmp_path / "start", tmp_path / "expected"))
    assert next(rows) == next(rows)
    warm_start.warm_start(config, tmp_path / "start", lambda row: pytest.fail("trained again"))
