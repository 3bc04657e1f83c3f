"""Multistep solvers of the probability-flow ODE: DPM-Solver++ and UniPC.

Tables of `linear.LinearSampler`, equal to diffusers' `DPMSolverMultistepScheduler` and
`UniPCMultistepScheduler`. Both work with estimates m of x₀ in λ = log(α/ς), where x = α·x₀ + ς·ε,
α = 1/√(σ²+1) and ς = σ·α; h is a step's length in λ. Over a flow, which UniPC samples too
(`use_flow_sigmas`, as Wan asks for), α = 1 − σ and ς = σ.
"""

from __future__ import annotations

import math

import numpy as np

from .linear import LinearSampler, clipping, estimate_of, linear_sampler
from .schedule import NoiseSchedule
from .sigmas import respaced_sigmas, shifted, timestep_of, trained_sigmas

SOLVER_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")


def dpm_sampler(schedule: NoiseSchedule, num_inference_steps: int) -> LinearSampler:
    """DPM-Solver++ (Lu 2022, arXiv 2211.01095, algorithm 2), order 1 or 2.

    x' = (ς'/ς)·x − α'(e^{−h} − 1)·[m₀ + (m₀ − m₁)/(2r)], r the last step's length over this one's
    ("midpoint"; "heun" weighs the difference otherwise). "sde-dpmsolver++" adds noise.

    Raises:
      ValueError: a step count or setting that is not supported.
    """
    solver = _checked_solver(schedule, orders=(1, 2), own=("midpoint", "heun"))
    cosine = schedule.beta_schedule == "squaredcos_cap_v2"
    timesteps, sigmas = _timesteps_and_sigmas(
        schedule, num_inference_steps, whole=not cosine, lowest=schedule.lambda_min_clipped
    )
    alpha, noise, lam = _levels(schedule, sigmas)
    count = len(timesteps)
    keep, weights, scale = np.zeros(count), np.zeros((count, 2)), np.zeros(count)
    sde = schedule.algorithm_type == "sde-dpmsolver++"
    few = schedule.lower_order_final and count < 15
    for i in range(count):
        h = lam[i + 1] - lam[i]
        decay = math.exp(-2 * h) if sde else math.exp(-h)
        keep[i] = noise[i + 1] / noise[i] * (math.exp(-h) if sde else 1.0)
        gain = alpha[i + 1] * (1 - decay)
        if sde:
            scale[i] = noise[i + 1] * math.sqrt(1 - decay)
        final = i == count - 1 and (
            schedule.euler_at_final or few or schedule.final_sigmas_type == "zero"
        )
        weights[i, 0] = gain
        if schedule.solver_order == 1 or i == 0 or final or h == 0:
            continue
        ratio = (lam[i] - lam[i - 1]) / h
        if solver == "midpoint":
            second = 0.5 * gain / ratio
        else:
            length = 2 * h if sde else h
            second = alpha[i + 1] * ((decay - 1) / length + 1) / ratio
        weights[i] += second, -second
    common = _common(schedule, alpha, noise, timesteps)
    return linear_sampler(**common, keep=keep, weights=weights, noise_scale=scale if sde else None)


def unipc_sampler(
    schedule: NoiseSchedule, num_inference_steps: int, *, mu: float | None = None
) -> LinearSampler:
    """UniPC (Zhao 2023, arXiv 2302.04867, algorithms 5 to 8), x₀ form, order 1 to 3.

    Each step first corrects x with the new estimate (UniC), then predicts the next x (UniP).

    `mu` is that of a flow's dynamic shift, required exactly when the schedule asks for one.

    Raises:
      ValueError: a step count or setting that is not supported, or `mu` missing or given in vain.
    """
    solver = _checked_solver(schedule, orders=(1, 2, 3), own=("bh2", "bh1"))
    if not schedule.predict_x0:
        raise ValueError("UniPC with predict_x0=False is not supported.")
    if schedule.use_flow_sigmas:
        timesteps, sigmas = _flow_timesteps_and_sigmas(schedule, num_inference_steps, mu)
    elif mu is not None:
        raise ValueError("`mu` belongs to models of a flow, whose use_flow_sigmas is true.")
    else:
        timesteps, sigmas = _timesteps_and_sigmas(schedule, num_inference_steps, whole=True)
    alpha, noise, lam = _levels(schedule, sigmas)
    count, order = len(timesteps), schedule.solver_order
    keep, weights = np.zeros(count), np.zeros((count, order))
    correct, correct_weights = np.tile([1.0, 0.0], (count, 1)), np.zeros((count, order + 1))
    if sigmas[-1] in (0, sigmas[-2]) and not schedule.lower_order_final and order > 1:
        raise ValueError(
            "UniPC of order 2 or 3 cannot end at σ = 0, or a flow's at its lowest σ, with "
            "lower_order_final=False: set lower_order_final=True or final_sigmas_type='sigma_min', "
            "of a flow the former."
        )
    before = 0  # the order of the last step
    for i in range(count):
        if i > 0 and i - 1 not in schedule.disable_corrector:
            kept, gain, differences = _unified(solver, alpha, noise, lam, i - 1, before, True)
            correct[i] = 0.0, kept
            correct_weights[i, 0] = differences[-1]
            correct_weights[i, 1] = gain - differences.sum()
            correct_weights[i, 2 : 1 + before] = differences[:-1]
        now = min(order, count - i) if schedule.lower_order_final else order
        before = min(now, i + 1)
        keep[i], gain, differences = _unified(solver, alpha, noise, lam, i, before, False)
        weights[i, 0] = gain - differences.sum()
        weights[i, 1:before] = differences
    common = _common(schedule, alpha, noise, timesteps)
    return linear_sampler(
        **common, keep=keep, weights=weights, correct=correct, correct_weights=correct_weights
    )


def _unified(
    solver: str,
    alpha: np.ndarray,
    noise: np.ndarray,
    lam: np.ndarray,
    i: int,
    order: int,
    corrector: bool,
) -> tuple[float, float, np.ndarray]:
    """A step from σ_i to σ_{i+1} as  kept·x + gain·m₀ + Σ difference_k·(m_k − m₀).

    The m_k are the estimates of the steps before; last, for a corrector, that at σ_{i+1} itself.
    """
    h = lam[i + 1] - lam[i]
    kept, grown = noise[i + 1] / noise[i], math.expm1(-h)
    gain = -alpha[i + 1] * grown
    size = order if corrector else order - 1
    if size == 0:
        return kept, gain, np.zeros(0)
    ratios = np.append([(lam[i - k] - lam[i]) / h for k in range(1, order)], 1.0)
    scale = -h if solver == "bh1" else grown
    phi, factorial, right = grown / -h - 1, 1, []
    for k in range(1, order + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    if size == 1:
        rho = np.asarray([0.5])
    else:
        powers = np.stack([ratios**k for k in range(size)])[:, :size]
        rho = np.linalg.solve(powers, np.asarray(right[:size]))
    return kept, gain, -alpha[i + 1] * scale * rho / ratios[:size]


def _checked_solver(
    schedule: NoiseSchedule, *, orders: tuple[int, ...], own: tuple[str, ...]
) -> str:
    """The solver's type: its own default, first, also for a configuration of the other solver."""
    kind = schedule.solver_type
    if kind is None or kind in {"midpoint", "heun", "bh1", "bh2"} - set(own):
        kind = own[0]
    values = {
        "solver_order": (schedule.solver_order, orders),
        "solver_type": (kind, own),
    }
    if "midpoint" in own:  # settings that only DPM-Solver has, or UniPC alone knows to honor
        values["algorithm_type"] = (schedule.algorithm_type, SOLVER_ALGORITHMS)
        values["use_lu_lambdas"] = (schedule.use_lu_lambdas, (False,))
        values["use_flow_sigmas"] = (schedule.use_flow_sigmas, (False,))
    elif schedule.use_flow_sigmas:
        for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            values[name] = (getattr(schedule, name), (False,))
    for name, (value, accepted) in values.items():
        if value not in accepted:
            raise ValueError(
                f"{name}={value!r} is not supported by this sampler; accepted: "
                f"{', '.join(map(str, accepted))}."
            )
    return kind


def _levels(
    schedule: NoiseSchedule, sigmas: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """α, ς and λ of each σ, float64; λ is infinite at σ = 0."""
    sigmas = sigmas.astype(np.float64)
    if schedule.use_flow_sigmas:
        alpha, noise = 1 - sigmas, sigmas
    else:
        alpha = 1 / np.sqrt(sigmas**2 + 1)
        noise = sigmas * alpha
    with np.errstate(divide="ignore"):
        return alpha, noise, np.log(alpha) - np.log(noise)


def _common(
    schedule: NoiseSchedule, alpha: np.ndarray, noise: np.ndarray, timesteps: np.ndarray
) -> dict:
    """What both solvers give `linear_sampler` alike."""
    estimate = estimate_of(schedule, alpha[:-1], noise[:-1], timesteps)
    clips = clipping(schedule, default=False) if schedule.thresholding else {}
    return {"timesteps": timesteps, "estimate": estimate, **clips}


def _flow_timesteps_and_sigmas(
    schedule: NoiseSchedule, num_steps: int, mu: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [n] and σ [n + 1] of a flow, descending; timesteps are cut off, as in diffusers."""
    count = schedule.num_train_timesteps
    if num_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {num_steps}.")
    sigmas = np.linspace(1, 1 / count, num_steps + 1)[:-1]
    sigmas = shifted(schedule, sigmas, schedule.flow_shift, mu)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # keeps λ finite
    last = sigmas[-1] if schedule.final_sigmas_type == "sigma_min" else 0
    return (sigmas * count).astype(np.int32), np.append(sigmas, last).astype(np.float32)


def _timesteps_and_sigmas(
    schedule: NoiseSchedule, num_steps: int, *, whole: bool, lowest: float = -math.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [n] and σ [n + 1], descending; one more is spaced than is taken.

    `whole` rounds the timesteps of Karras' levels; others are cut off, as in diffusers. Timesteps
    whose λ is below `lowest` are left out.
    """
    trained = trained_sigmas(schedule)
    log_trained = np.log(trained)
    count = schedule.num_train_timesteps
    if not 1 <= num_steps < count:
        raise ValueError(
            f"num_inference_steps must be between 1 and num_train_timesteps - 1 = {count - 1}; "
            f"got {num_steps}."
        )
    # A cosine schedule's last timesteps may be left out: λ is too small there.
    end = count - int(np.searchsorted(-log_trained[::-1], lowest))
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "linspace":
        timesteps = np.linspace(0, end - 1, num_steps + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = (np.arange(num_steps + 1) * (end // (num_steps + 1)))[:0:-1]
        timesteps = timesteps + schedule.steps_offset
    else:
        timesteps = np.arange(end, 0, -count / num_steps).round()[:num_steps] - 1
    if timesteps[0] >= count:
        raise ValueError(
            f"steps_offset={schedule.steps_offset} asks for timestep {int(timesteps[0])}, outside "
            f"0…{count - 1}; use fewer steps or a smaller offset."
        )
    sigmas = respaced_sigmas(schedule, trained[::-1], num_steps)
    if sigmas is None:
        sigmas = np.interp(timesteps, np.arange(count), trained)
    else:
        timesteps = timestep_of(sigmas, log_trained)
        if schedule.use_karras_sigmas and whole:
            timesteps = timesteps.round()
    last = trained[0] if schedule.final_sigmas_type == "sigma_min" else 0
    return timesteps.astype(np.int32), np.append(sigmas, last).astype(np.float32)
