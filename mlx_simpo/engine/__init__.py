"""Pairs of tokens → log-probabilities: the heart of the package."""
