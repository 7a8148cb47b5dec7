"""A warm start that takes seconds, and whose policy is right often enough for rewards to vary."""

from experiments import configs, warm_start
from experiments.models.decoder import DecoderConfig
from experiments.tasks.settings import TaskConfig

TASK = TaskConfig(task_options=("digits=1", "validation_problems=20"))
WARM = warm_start.WarmStartConfig(
    decoder=DecoderConfig(14, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=16),
    target_accuracy=0.0,
    check_every=50,
    batch_size=64,
    learning_rate=1e-2,
)
START = warm_start.StartConfig(TASK, WARM)


def run_config(method, settings, **changes):
    return configs.RunConfig(method, task=TASK, start=WARM, training=settings, **changes)
