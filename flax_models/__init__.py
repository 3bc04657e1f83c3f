"""What computes: Flax NNX modules, one architecture per file, named as their PyTorch originals."""
