"""Where PROMA is hooked into a Tunix learner, and what is refused. Tunix's private name is here.

Two attributes of the learner's trainer are replaced: `create_train_step_fn`, and
`_post_process_train_step`, which Tunix says to override, for the metrics.
"""

from typing import Any

import numpy as np
import optax
from flax import nnx
from tunix.rl.grpo import grpo_learner

from proma_jax.settings import Accumulation, Intra, check_settings, mask_leaves
from proma_jax.tunix.step import Variant, train_step_fn


def install(learner: Any, accumulation: Accumulation | None, intra: Intra | None) -> None:
    """Does what `use_proma` says."""
    if accumulation is None and intra is None:
        raise ValueError("accumulation and intra are both None: give the settings of one, or both.")
    check_settings(accumulation, intra)
    _check_learner(learner)
    trainer = learner.rl_cluster.actor_trainer
    _check_masks(trainer, accumulation, intra)
    k = trainer.config.gradient_accumulation_steps
    if accumulation is not None and k == 1:
        raise ValueError(
            "mini_batch_size equals train_micro_batch_size, so that an optimizer step is one "
            "microbatch, and accumulation has nothing to remove: take smaller microbatches."
        )
    variant = Variant(
        trainer.optimizer.tx,
        learner.rl_cluster.cluster_config.training_config.actor_optimizer,
        k,
        accumulation,
        intra,
    )
    step = train_step_fn(variant, learner)
    trainer.create_train_step_fn = lambda: step
    trainer.clear_jit_cache()
    _log_fractions(trainer, accumulation, intra)


def _check_learner(learner: Any) -> None:
    if not isinstance(learner, grpo_learner.GRPOLearner):
        raise ValueError(
            f"learner is a {type(learner).__name__}: PROMA goes with tunix.rl.grpo's GRPOLearner "
            "and what is derived from it."
        )
    if not hasattr(learner, "rl_cluster"):
        raise ValueError(
            "learner has no rl_cluster, as it has in google-tunix 0.1.7: install that. In later "
            "versions Tunix accumulates in another way, which PROMA does not know."
        )
    trainer = learner.rl_cluster.actor_trainer
    config = trainer.config
    if config.max_seq_token_per_tpu is not None:
        raise ValueError(
            "max_seq_token_per_tpu packs several sequences into one row, and PROMA needs the score "
            "of each: leave it out of RLTrainingConfig."
        )
    if config.gradient_accumulation_steps is None:
        raise ValueError(
            "RLTrainingConfig has no train_micro_batch_size: set it, and mini_batch_size, which is "
            "a multiple of it. An optimizer step has as many microbatches."
        )
    if "create_train_step_fn" in vars(trainer):
        raise ValueError("the learner's train step was replaced already: call use_proma once.")
    if not isinstance(trainer.optimizer.tx, optax.MultiSteps):
        raise ValueError(
            f"the trainer accumulates by {type(trainer.optimizer.tx).__name__}, not by "
            "optax.MultiSteps as in google-tunix 0.1.7: install that."
        )
    if getattr(trainer.model.config, "use_flash_attention", False):
        raise ValueError(
            "the model uses flash attention, with which per-sequence scores have never been tried: "
            "make it with use_flash_attention=False."
        )
    taken = int(trainer.optimizer.opt_state.mini_step[...])
    if taken:
        raise ValueError(
            f"the optimizer has taken {taken} of {config.gradient_accumulation_steps} microbatches "
            "of a step, but Tunix counts from 0 where it starts, as from a checkpoint that was "
            f"saved amid a step: remove {config.checkpoint_root_directory}/{trainer.train_steps} "
            "to go on from the checkpoint before it."
        )


def _check_masks(trainer: Any, *variants: Accumulation | Intra | None) -> None:
    params = nnx.as_pure(nnx.state(trainer.model, trainer.optimizer.wrt))
    for settings in variants:
        if settings is not None and settings.mask is not None:
            mask_leaves(settings.mask, params)


def _log_fractions(trainer: Any, accumulation: Any, intra: Any) -> None:
    """Adds the fractions to what the trainer logs of training; evaluation has none."""
    tunix_own = trainer._post_process_train_step
    chosen = {"proma/accumulation_fraction": accumulation, "proma/intra_fraction": intra}
    fractions = {name: np.mean for name, settings in chosen.items() if settings is not None}

    def post_process(aux: Any) -> None:
        others = trainer.rl_metrics_to_log
        trainer.with_rl_metrics_to_log({**others, **fractions})
        tunix_own(aux)
        trainer.with_rl_metrics_to_log(others)

    trainer._post_process_train_step = post_process
