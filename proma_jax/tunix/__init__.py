"""PROMA in Tunix: `use_proma` puts it in the place of a GRPOLearner's gradient accumulation.

It needs the extra `tunix`, and nothing else of proma_jax imports it.

    learner = GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward)
    proma_jax.tunix.use_proma(learner, accumulation=proma_jax.Accumulation())
    learner.train(dataset)
"""

from typing import Any

from proma_jax.settings import Accumulation, Intra

__all__ = ["use_proma"]


def use_proma(
    learner: Any, *, accumulation: Accumulation | None = None, intra: Intra | None = None
) -> None:
    """Makes a Tunix learner train by PROMA from here on.

    Its model, loss, optimizer, rollouts, metrics and checkpoints stay Tunix's own; only what
    becomes of a microbatch's gradient changes. An optimizer step has
    mini_batch_size / train_micro_batch_size microbatches, and the optimizer gets their mean, as
    without PROMA. Each step's mean of what was removed is logged as "proma/accumulation_fraction"
    and "proma/intra_fraction", beside Tunix's "loss". Schedules of the settings go on where a
    checkpoint was restored.

    Args:
      learner: a `GRPOLearner` or one derived from it, as DAPO's and Dr. GRPO's, that does not train
        yet.
      accumulation: settings of the accumulation variant. Default: None, Tunix's own accumulation.
      intra: settings of the intra-microbatch variant. Default: None, without it.

    Raises:
      ImportError: Tunix is not installed.
      ValueError: both settings are None, or one is something else than settings; a mask does not
        fit the model; or the learner has something that PROMA cannot go with: sequence packing, no
        microbatches, a checkpoint from amid an optimizer step.
    """
    try:
        import tunix.rl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "proma_jax.tunix needs Tunix, which the extra 'tunix' installs: "
            "pip install '.[tunix]' in a clone of proma_jax."
        ) from error
    from proma_jax.tunix.hooks import install

    install(learner, accumulation, intra)
