"""What a policy is asked and how its responses are graded."""
