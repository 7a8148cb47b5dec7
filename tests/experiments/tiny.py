"""A warm start that takes seconds, and whose policy is right often enough for rewards to vary."""

from experiments import warm_start
from experiments.models.decoder import DecoderConfig
from experiments.tasks.addition import VOCAB_SIZE, Addition

START = warm_start.WarmStartConfig(
    task=Addition(digits=1, validation_problems=20),
    decoder=DecoderConfig(
        VOCAB_SIZE, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=16
    ),
    target_accuracy=0.0,
    check_every=50,
    batch_size=64,
    learning_rate=1e-2,
)
