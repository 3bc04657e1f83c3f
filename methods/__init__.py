"""Losses, pure training steps, samplers, metrics, data and the training loop: what trains."""
