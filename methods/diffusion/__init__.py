"""Diffusion models at work: images and videos of prompts, and objectives of several methods."""
