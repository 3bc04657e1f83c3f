"""Building blocks shared by the architectures: embeddings, attention, transformers, resnets."""
