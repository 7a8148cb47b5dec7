"""The example runs and learns."""

from examples import tunix_grpo


def test_tunix_grpo():
    rewards = tunix_grpo.main(steps=8)
    assert len(rewards) == 8
    assert rewards[-1] > rewards[0] + 0.1
