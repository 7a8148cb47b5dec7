"""What a researcher runs: the comparison of the four methods, from the data to the figures."""
