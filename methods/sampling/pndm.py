"""PNDM (Liu 2022, arXiv 2202.09778): linear multistep sampling, which Stable Diffusion 1 asks for.

Tables of `linear.LinearSampler`, equal to diffusers' `PNDMScheduler`. Every evaluation of the model
is followed by the paper's transfer from a timestep t to a timestep s, with a mean ε of outputs:
x' = √(ᾱ_s/ᾱ_t)·x − (ᾱ_s − ᾱ_t)/(ᾱ_t·√(1−ᾱ_s) + √(ᾱ_t·(1−ᾱ_t)·ᾱ_s))·ε. The mean is that of the
Adams-Bashforth formulas; a run begins with the means at both ends of its first step
(`skip_prk_steps`, as in Stable Diffusion), or with three Runge-Kutta steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .linear import LinearSampler, linear_sampler
from .schedule import NoiseSchedule, alphas_cumprod, inference_timesteps

# Weights of the newest outputs, by how many there are.
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """One evaluation of the model, and the step that follows it."""

    time: int  # that the model is told
    start: int
    stop: int  # the step is from start to stop; below 0 it is the image
    mean: dict[int, float]  # number of an evaluation -> weight of its output
    again: bool = False  # from the x at which the last step that is not `again` began


def pndm_sampler(schedule: NoiseSchedule, num_inference_steps: int) -> LinearSampler:
    """Tables of a PNDM run of n steps.

    With `skip_prk_steps` the model is evaluated n + 1 times (once for n = 1), the second one of
    the timesteps twice; otherwise n + 9 times. Zero terminal SNR is not for this sampler: it takes
    the betas as they were before, as diffusers does.

    Raises:
      ValueError: a model that predicts x₀, fewer than four steps without `skip_prk_steps`, or a
        step count that the schedule does not allow.
    """
    if schedule.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            "pndm takes models of prediction_type epsilon or v_prediction, not "
            f"{schedule.prediction_type}: choose another sampler, such as 'ddim'."
        )
    run = _evaluations(schedule, num_inference_steps)
    start, stop = (np.asarray([getattr(each, name) for each in run]) for name in ("start", "stop"))
    plain = dataclasses.replace(schedule, rescale_betas_zero_snr=False)
    table = alphas_cumprod(plain).astype(np.float64)
    alpha = table[start]
    final = 1.0 if schedule.set_alpha_to_one else table[0]
    alpha_next = np.where(stop >= 0, table[np.maximum(stop, 0)], final)
    of_noise = (alpha - alpha_next) / (
        alpha * np.sqrt(1 - alpha_next) + np.sqrt(alpha * (1 - alpha) * alpha_next)
    )
    # ε as x and the mean of the outputs give it
    of_x, of_mean = 0.0, np.ones_like(alpha)
    if schedule.prediction_type == "v_prediction":
        of_x, of_mean = np.sqrt(1 - alpha), np.sqrt(alpha)
    ages = [{i - number: weight for number, weight in run[i].mean.items()} for i in range(len(run))]
    weights = np.zeros((len(run), 1 + max(map(max, ages))))
    for i, mean in enumerate(ages):
        weights[i, list(mean)] = of_noise[i] * of_mean[i] * np.asarray(list(mean.values()))
    return linear_sampler(
        timesteps=np.asarray([each.time for each in run], np.int32),
        estimate=(0.0, 1.0, 1.0),  # what is remembered are outputs
        keep=np.sqrt(alpha_next / alpha) + of_noise * of_x,
        weights=weights,
        correct=[[0, 1] if each.again else [1, 0] for each in run],
    )


def _evaluations(schedule: NoiseSchedule, num_steps: int) -> list[_Evaluation]:
    """All evaluations of a run, in their order."""
    spacing = schedule.timestep_spacing or "leading"
    times = np.round(inference_timesteps(schedule, num_steps, spacing)).astype(int).tolist()
    # A constant stride, even if the spacing is uneven: as in diffusers.
    stride = schedule.num_train_timesteps // num_steps
    run: list[_Evaluation] = []
    if schedule.skip_prk_steps:
        read = [0]  # the evaluations whose outputs the multistep formula reads
        run.append(_Evaluation(times[0], times[0], times[0] - stride, {0: 1.0}))
        if num_steps > 1:
            mean = {0: 0.5, 1: 0.5}
            run.append(_Evaluation(times[1], times[1] + stride, times[1], mean, again=True))
        rest = times[1:]
    elif num_steps < 4:
        raise ValueError(
            "pndm with skip_prk_steps=False begins with three Runge-Kutta steps: it takes "
            f"num_inference_steps of at least 4; got {num_steps}. Choose another sampler, such as "
            "'ddim', for fewer."
        )
    else:
        read, half = [0, 4, 8], stride // 2
        for first, start, stop in zip(read, times, times[1:4], strict=False):
            middle = stop + half
            mean = dict(enumerate(_RUNGE_KUTTA, first))
            run += [
                _Evaluation(start, start, start - half, {first: 1.0}),
                _Evaluation(middle, start, middle, {first + 1: 1.0}, again=True),
                _Evaluation(middle, start, stop, {first + 2: 1.0}, again=True),
                _Evaluation(stop, start, stop, mean, again=True),
            ]
        rest = times[3:]
    for time in rest:
        read = [*read, len(run)][-4:]
        mean = dict(zip(reversed(read), _ADAMS_BASHFORTH[len(read)], strict=True))
        run.append(_Evaluation(time, time, time - stride, mean))
    return run
