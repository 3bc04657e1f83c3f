"""Diffusion models at work: what several methods train towards."""
