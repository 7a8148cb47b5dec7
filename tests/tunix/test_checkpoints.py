"""Tunix's checkpoints hold PROMA's state: runs go on from them, from either's, or say why not."""

import chex
import orbax.checkpoint as ocp
import pytest

import proma_jax as proma
from proma_jax.tunix import use_proma
from tests.tunix import tiny

BOTH = {"accumulation": proma.Accumulation(), "intra": proma.Intra(rank=2)}


def learner(folder, steps):
    options = ocp.CheckpointManagerOptions(save_interval_steps=1)
    return tiny.learner(
        training={
            "max_steps": steps,
            "checkpoint_root_directory": str(folder),
            "checkpointing_options": options,
        }
    )


def train(folder, steps, variant):
    one = learner(folder, steps)
    if variant:
        use_proma(one, **variant)
    one.train(tiny.prompts())
    assert one.rl_cluster.actor_trainer.train_steps == steps
    return tiny.parameters(one)


def test_an_interrupted_run_goes_on_as_one_that_was_not(tmp_path):
    expected = train(tmp_path / "whole", 3, BOTH)
    train(tmp_path / "parts", 1, BOTH)
    found = train(tmp_path / "parts", 3, BOTH)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [({}, BOTH), (BOTH, {})])
def test_either_goes_on_from_a_checkpoint_of_the_other(tmp_path, first, second):
    train(tmp_path, 1, first)
    train(tmp_path, 2, second)


def test_a_checkpoint_from_amid_an_optimizer_step_is_refused(tmp_path):
    one = learner(tmp_path, 3)
    use_proma(one, **BOTH)
    update_actor = one.rl_cluster.update_actor

    def stopped(train_ds, eval_ds, skip_jit):
        update_actor(train_ds, eval_ds, skip_jit)
        if one.rl_cluster.actor_trainer.iter_steps == 3:
            raise KeyboardInterrupt

    one.rl_cluster.update_actor = stopped
    with pytest.raises(KeyboardInterrupt):
        one.train(tiny.prompts())
    trainer = one.rl_cluster.actor_trainer
    trainer.checkpoint_manager.save(2, trainer.model, trainer.optimizer, force=True)
    trainer.checkpoint_manager.close()
    with pytest.raises(ValueError, match=r"taken 1 of 2 microbatches.*remove .*/2 to go on"):
        use_proma(learner(tmp_path, 3), **BOTH)
