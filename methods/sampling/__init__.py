"""Samplers as pure functions: noise schedules, DDIM and Euler."""
