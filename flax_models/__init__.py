"""Flax NNX models, one architecture per file, named as their PyTorch originals: what computes."""
