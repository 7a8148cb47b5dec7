"""What PROMA removes from gradients: pure arithmetic on scores, for one microbatch."""
