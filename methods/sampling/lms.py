"""LMS: linear multistep integration of the probability-flow ODE over noise levels σ.

Liu et al. 2022 (arXiv 2202.09778, appendix) after Crowson's k-diffusion: the derivative
d = (x − x₀) / σ, of Karras 2022 (arXiv 2206.00364, equation 3), is continued by the polynomial
through its last four values (Adams and Bashforth), whose integral is exact.  Names and tables are
those of diffusers' LMSDiscreteScheduler, with which UnlearnDiffAtk's figures were drawn.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .euler import timesteps_and_sigmas
from .linear import LinearSampler, linear_sampler
from .schedule import NoiseSchedule
from .sigmas import initial_sigma

_ORDER = 4


def lms_sampler(schedule: NoiseSchedule, num_inference_steps: int) -> LinearSampler:
    """Tables of an LMS run.

    Zero terminal SNR, and noise levels interpolated in their logarithm, are not for this sampler:
    it takes what diffusers takes.

    Raises:
      ValueError: a step count that the schedule does not allow.
    """
    plain = dataclasses.replace(
        schedule,
        rescale_betas_zero_snr=False,
        interpolation_type="linear",
        final_sigmas_type="zero",
        timestep_type="discrete",
        sigma_min=None,
        sigma_max=None,
    )
    spacing = schedule.timestep_spacing or "linspace"
    timesteps, sigmas = timesteps_and_sigmas(plain, num_inference_steps, spacing)
    levels = sigmas.astype(np.float64)
    sigma = levels[:-1]
    input_scale = 1 / np.sqrt(sigma**2 + 1)
    of_x, of_output = {  # x₀
        "epsilon": (1.0, -sigma),
        "sample": (0.0, 1.0),
        "v_prediction": (input_scale**2, -sigma * input_scale),
    }[schedule.prediction_type]
    return linear_sampler(
        timesteps=timesteps,
        init_noise_sigma=initial_sigma(sigmas, spacing),
        input_scale=input_scale,
        estimate=((1 - of_x) / sigma, -of_output / sigma, 1.0),  # what is remembered are d
        keep=1.0,
        weights=np.stack([_weights(levels, step) for step in range(len(sigma))]),
    )


def _weights(sigmas: np.ndarray, step: int) -> np.ndarray:
    """Of the last derivatives, newest first: the integrals of their Lagrange polynomials."""
    known = sigmas[max(step - _ORDER + 1, 0) : step + 1][::-1]
    weights = np.zeros(_ORDER)
    for age, own in enumerate(known):
        others = np.delete(known, age)
        whole = np.polynomial.Polynomial.fromroots(others) if len(others) else None
        primitive = (whole or np.polynomial.Polynomial([1.0])).integ()
        integral = primitive(sigmas[step + 1]) - primitive(sigmas[step])
        weights[age] = integral / np.prod(own - others)
    return weights
