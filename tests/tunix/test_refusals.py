"""What PROMA cannot go with is refused before anything trains, and the learner stays as it was."""

import chex
import jax
import optax
import pytest

import proma_jax as proma
from proma_jax.tunix import use_proma
from tests.tunix import models, tiny

ACCUMULATION = {"accumulation": proma.Accumulation()}
ONE_MICROBATCH = {"train_micro_batch_size": 4}

REFUSED = {
    "are both None": (lambda: tiny.learner(), {}),
    "packs several sequences": (
        lambda: tiny.learner(training={"max_seq_token_per_tpu": 64}),
        ACCUMULATION,
    ),
    "has no train_micro_batch_size": (
        lambda: tiny.learner(training={"train_micro_batch_size": None}),
        ACCUMULATION,
    ),
    "nothing to remove": (lambda: tiny.learner(training=ONE_MICROBATCH), ACCUMULATION),
    "flash attention": (
        lambda: tiny.learner(models.tiny_qwen3(use_flash_attention=True)),
        ACCUMULATION,
    ),
    "learner is a dict": (dict, ACCUMULATION),
}


def is_untouched(learner):
    replaced = {"create_train_step_fn", "_post_process_train_step"}
    return not replaced & vars(learner.rl_cluster.actor_trainer).keys()


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_go_together_is_refused(message):
    make, variant = REFUSED[message]
    learner = make()
    with pytest.raises(ValueError, match=message):
        use_proma(learner, **variant)
    if isinstance(learner, dict):
        return
    assert is_untouched(learner)


NOT_SETTINGS = {
    r"intra=Grad.* must be a proma_jax\.Intra, such as Intra\(rank=2\), or None": {
        "intra": proma.project_intra(rank=2)
    },
    r"accumulation=Grad.* must be a proma_jax\.Accumulation, such as Accumulation\(.*\), or None": {
        "accumulation": proma.accumulate(optax.sgd(1.0), 2)
    },
    r"accumulation=0\.5 must be": {"accumulation": 0.5},
    r"intra=<class 'proma_jax\.settings\.Intra'> must be": {"intra": proma.Intra},
    r"accumulation=Intra\(rank=10.* must be a proma_jax\.Accumulation": {
        "accumulation": proma.Intra()
    },
    "mask does not fit the updates: it holds 'attn'": {
        "accumulation": proma.Accumulation(mask="attn")
    },
    "mask does not fit the updates: .*different types": {
        "accumulation": proma.Accumulation(),
        "intra": proma.Intra(mask=lambda grads: None),
    },
}


def test_what_is_not_settings_is_refused():
    learner = tiny.learner()
    for message, variant in NOT_SETTINGS.items():
        with pytest.raises(ValueError, match=message):
            use_proma(learner, **variant)
    assert is_untouched(learner)


def test_a_second_call_is_refused():
    learner = tiny.learner()
    use_proma(learner, **ACCUMULATION)
    with pytest.raises(ValueError, match="call use_proma once"):
        use_proma(learner, **ACCUMULATION)


def test_another_accumulation_than_multisteps_is_refused():
    learner = tiny.learner()
    learner.rl_cluster.actor_trainer.optimizer.tx = object()
    with pytest.raises(ValueError, match=r"not by optax.MultiSteps as in google-tunix 0\.1\.7"):
        use_proma(learner, **ACCUMULATION)


def test_a_learner_of_another_version_is_refused():
    learner = tiny.learner()
    del learner.rl_cluster
    with pytest.raises(ValueError, match=r"learner has no rl_cluster.*google-tunix 0\.1\.7"):
        use_proma(learner, **ACCUMULATION)


def attention(grads):
    def chosen(path, _):
        name = jax.tree_util.keystr(path)
        return "attn" in name and "_proj" in name

    return jax.tree.map_with_path(chosen, grads)


def test_intra_goes_with_one_microbatch_a_step_and_a_mask():
    learner = tiny.learner(training=ONE_MICROBATCH | {"max_steps": 1})
    use_proma(learner, intra=proma.Intra(rank=2, mask=attention))
    before = tiny.parameters(learner)
    learner.train(tiny.prompts(1))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(before, tiny.parameters(learner))
    assert 0 < tiny.logged(learner, "proma/intra_fraction") < 1
