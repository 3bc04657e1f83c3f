"""The noise schedule of a diffusion model, read from a diffusers `scheduler_config.json`.

`NoiseSchedule` holds the settings; `alphas_cumprod` turns them into the table ᾱ_t that training and
sampling share, computed on the host in the float32/float64 steps that diffusers 0.42 takes, so the
tables agree bit for bit (to 3e-7 with zero terminal SNR). The functions below are the training
side: noise an image, and name the prediction target.

Notation (Ho 2020, Song 2021; arXiv 2006.11239, 2010.02502): x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε, and the
velocity of Salimans & Ho (arXiv 2202.00512) v = √ᾱ_t·ε − √(1−ᾱ_t)·x₀. Arrays are `[B, *X, C]` and
come back in float32; timesteps are integers in [0, num_train_timesteps).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# A host or device array: the leaves of a sampler, which is a pytree, may be either, or tracers.
Table = Any

TIME_SHIFT_TYPES = ("exponential", "linear")
# The values that settings take.
_ACCEPTED: Mapping[str, tuple[str | None, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": (None, "leading", "trailing", "linspace"),
    "interpolation_type": ("linear", "log_linear"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_type": ("discrete", "continuous"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "time_shift_type": TIME_SHIFT_TYPES,
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The settings each diffusers class takes; every class also takes `_COMMON`.
_BETAS = ("beta_schedule", "beta_start", "beta_end")
_COMMON = _names("num_train_timesteps trained_betas prediction_type timestep_spacing steps_offset")
_COMMON |= set(_BETAS)
_THRESHOLDING = _names("thresholding dynamic_thresholding_ratio sample_max_value")
_CLIPPING = _THRESHOLDING | _names("clip_sample clip_sample_range")
_SIGMAS = _names("use_karras_sigmas use_exponential_sigmas use_beta_sigmas final_sigmas_type")
_SIGMAS |= {"rescale_betas_zero_snr"}
_SOLVER = _SIGMAS | _THRESHOLDING | _names("solver_order solver_type lower_order_final")
_SOLVER |= _names("use_flow_sigmas flow_shift use_dynamic_shifting time_shift_type")
_CLASS_SETTINGS = {
    "DDIMScheduler": _CLIPPING | _names("set_alpha_to_one rescale_betas_zero_snr"),
    "EulerDiscreteScheduler": _SIGMAS
    | _names("interpolation_type sigma_min sigma_max timestep_type"),
    "EulerAncestralDiscreteScheduler": _names("rescale_betas_zero_snr"),
    "DPMSolverMultistepScheduler": _SOLVER
    | _names("algorithm_type euler_at_final use_lu_lambdas lambda_min_clipped"),
    "UniPCMultistepScheduler": _SOLVER
    | _names("predict_x0 disable_corrector sigma_min sigma_max shift_terminal"),
    "LCMScheduler": _CLIPPING
    | _names("original_inference_steps set_alpha_to_one timestep_scaling rescale_betas_zero_snr"),
    "PNDMScheduler": _names("set_alpha_to_one skip_prk_steps"),
    "LMSDiscreteScheduler": _names("use_karras_sigmas use_exponential_sigmas use_beta_sigmas"),
    "DDPMScheduler": _CLIPPING | _names("rescale_betas_zero_snr variance_type"),
}
_CLASS_SETTINGS = {name: _COMMON | own for name, own in _CLASS_SETTINGS.items()}
for _name in ("DDIM", "DDPM"):
    _CLASS_SETTINGS[f"{_name}ParallelScheduler"] = _CLASS_SETTINGS[f"{_name}Scheduler"]
# Left out of a file while None.
_UNSET = _names("timestep_spacing variance_type solver_type clip_sample set_alpha_to_one")
# Where the betas of a class, which belong to the model, differ from those below by default.
_HEUN = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
_HEUN_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_LCM_BETAS = _HEUN_BETAS | {"beta_schedule": "scaled_linear"}
_CLASS_BETAS = {f"{name}Scheduler": _HEUN_BETAS for name in _HEUN}
_CLASS_BETAS |= {f"{name}Scheduler": _LCM_BETAS for name in ("LCM", "TCD")}
# Classes whose steps are not ported -> the sampler that is closest; they have betas by default.
_CLOSEST = {
    "DEISMultistepScheduler": "dpm++",
    "DPMSolverSDEScheduler": "dpm++",
    "DPMSolverSinglestepScheduler": "dpm++",
    "HeunDiscreteScheduler": "euler",
    "KDPM2AncestralDiscreteScheduler": "euler-ancestral",
    "KDPM2DiscreteScheduler": "euler",
    "SASolverScheduler": "dpm++",
    "TCDScheduler": "ddim",
}
# Values by which DEIS and SA-Solver name their own algorithms; other solvers take their default.
_FOREIGN_SOLVERS = (
    ("algorithm_type", "deis"),
    ("solver_type", "logrho"),
    ("algorithm_type", "data_prediction"),
    ("algorithm_type", "noise_prediction"),
)
# Settings of other samplers' steps, which change nothing here, and the values for which that is
# true; None stands for all.
_INERT: Mapping[str, tuple[Any, ...] | None] = {
    "solver_p": (None,),  # another scheduler in the predictor's place
    "snr_shift_scale": (None, 1, 1.0),  # changes the table of betas
    **dict.fromkeys(_names("predictor_order corrector_order tau_func")),  # SA-Solver's
    **dict.fromkeys(_names("noise_sampler_seed eta num_inference_steps tensor_format")),
}


@dataclasses.dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """Settings of diffusers' schedulers over a table of betas, under the same names.

    None stands for the default of the class that samples, as in diffusers: `timestep_spacing` is
    "leading" for DDIM and "linspace" for Euler, `clip_sample` is true for DDIM and false for LCM,
    `set_alpha_to_one` is true for DDIM and false for PNDM.
    Settings that only another sampler knows (`clip_sample` for Euler, `use_karras_sigmas` for DDIM,
    …) are kept and do nothing there, as in diffusers. Hashable, so it may be a static argument of
    `jax.jit`.

    Raises `ValueError` for a setting out of range, at construction.
    """

    scheduler_class: str = "DDIMScheduler"  # the class that owns the configuration on disk
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None  # replaces the three settings above
    rescale_betas_zero_snr: bool = False  # arXiv 2305.08891, algorithm 1
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0  # added to the timesteps of "leading"
    # DDIM and PNDM
    set_alpha_to_one: bool | None = None  # ᾱ after the last step: 1 (DDIM's), or ᾱ_0 (PNDM's)
    skip_prk_steps: bool = False  # PNDM begins without Runge-Kutta steps
    # DDIM
    clip_sample: bool | None = None  # clip x₀ to ±clip_sample_range
    clip_sample_range: float = 1.0
    thresholding: bool = False  # dynamic thresholding (arXiv 2205.11487), replaces clipping
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    # Euler
    interpolation_type: str = "linear"
    use_karras_sigmas: bool = False  # arXiv 2206.00364, equation 5
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False  # arXiv 2407.12173
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"  # "continuous" gives ¼·ln σ to a v-prediction model
    final_sigmas_type: str = "zero"
    # DDPM
    variance_type: str | None = None  # of the fresh noise; None is "fixed_small"
    # DPM-Solver++ and UniPC
    solver_order: int = 2
    solver_type: str | None = None  # None is the solver's own: "midpoint", or "bh2" for UniPC
    lower_order_final: bool = True
    algorithm_type: str = "dpmsolver++"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    lambda_min_clipped: float = -math.inf
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()  # steps after which UniPC does not correct
    use_flow_sigmas: bool = False  # for models of a flow, and what follows
    flow_shift: float = 1.0  # spends more steps on high noise
    use_dynamic_shifting: bool = False  # the shift is that of `mu`, which a run is given
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None  # σ of the last step before 0
    # LCM
    original_inference_steps: int = 50  # the model was distilled on
    timestep_scaling: float = 10.0
    # Settings of the file that change nothing here; written back unchanged
    inert: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, accepted in _ACCEPTED.items():
            if name == "prediction_type" and self.use_flow_sigmas:
                accepted = (*accepted, "flow_prediction")
            _require(name, getattr(self, name), accepted)
        if self.num_train_timesteps < 1:
            raise ValueError(
                f"num_train_timesteps must be at least 1; got {self.num_train_timesteps}."
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas must hold one value per training timestep "
                f"(num_train_timesteps={self.num_train_timesteps}); got {len(self.trained_betas)}."
            )
        spacings = (self.use_karras_sigmas, self.use_exponential_sigmas, self.use_beta_sigmas)
        if sum(spacings) > 1:
            raise ValueError(
                "At most one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas may "
                "be true."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads the dictionary of a diffusers `scheduler_config.json`.

        `_class_name` is that of a scheduler in diffusers, and DDIMScheduler where absent. Of a
        class whose steps are not known here the betas and the prediction type are read, and its
        other settings are inert. Where the file is silent, betas are by default those of its class,
        and all other settings those of the class that samples. Keys that start with "_" are
        ignored.

        Raises:
          ValueError: a class without betas, an unknown setting of a known class, or a value that is
            not supported.
        """
        scheduler_class = config.get("_class_name") or "DDIMScheduler"
        if not isinstance(scheduler_class, str):
            raise ValueError(f"_class_name must be a scheduler's name; got {scheduler_class!r}.")
        foreign = scheduler_class not in _CLASS_SETTINGS
        told = config.get("trained_betas") is not None or all(name in config for name in _BETAS)
        if foreign and scheduler_class not in _CLOSEST and not told:
            raise ValueError(
                f"The scheduler class {scheduler_class!r} is not known, and its configuration has "
                f"no {', '.join(_BETAS)}, which belong to the model; known are "
                f"{', '.join([*_CLASS_SETTINGS, *_CLOSEST])}."
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        settings: dict[str, Any] = {"scheduler_class": scheduler_class}
        settings |= _CLASS_BETAS.get(scheduler_class, {})
        inert: list[tuple[str, Any]] = []
        for name, value in config.items():
            if name.startswith("_"):
                continue
            if name == "predict_epsilon":  # how diffusers wrote the prediction type up to 0.8
                predicted = "sample" if value is False else "epsilon"
                _require("prediction_type", config.get("prediction_type", predicted), (predicted,))
                settings["prediction_type"] = predicted
            elif name in _INERT:
                _require(name, value, _INERT[name])
                inert.append((name, _frozen(value)))
            elif name in ("scheduler_class", "inert") or name not in fields:
                if not foreign:
                    known = sorted(frozenset().union(*_CLASS_SETTINGS.values(), _INERT))
                    raise ValueError(
                        f"Unknown scheduler setting {name}={value!r} for {scheduler_class}; known "
                        f"are {', '.join(known)}. Remove it if it has no effect."
                    )
                inert.append((name, _frozen(value)))
            elif name == "trained_betas":
                settings[name] = None if value is None else tuple(float(beta) for beta in value)
            elif name == "disable_corrector":
                settings[name] = tuple(int(step) for step in value or ())
            elif (name, value) in _FOREIGN_SOLVERS:
                inert.append((name, value))
            else:
                settings[name] = checked(fields[name], value)
        return cls(inert=tuple(inert), **settings)

    def to_config(self) -> dict[str, Any]:
        """The `scheduler_config.json` dictionary; `from_config` of it gives an equal schedule.

        Holds every setting of `scheduler_class`, and those of other classes that differ from their
        defaults.
        """
        own = _CLASS_SETTINGS.get(self.scheduler_class, _COMMON)
        config: dict[str, Any] = {"_class_name": self.scheduler_class}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("scheduler_class", "inert"):
                continue
            if field.name in _UNSET and value is None:
                continue  # absent means the sampling class's default, here and in diffusers
            if field.name in own or value != field.default:
                config[field.name] = list(value) if isinstance(value, tuple) else value
        return config | {name: _thawed(value) for name, value in self.inert}

    @property
    def closest_sampler(self) -> str | None:
        """Which sampler to take in place of a class whose steps are not known; None for others."""
        if self.scheduler_class in _CLASS_SETTINGS:
            return None
        return _CLOSEST.get(self.scheduler_class, "ddim")


def _frozen(value: Any) -> Any:
    """A JSON value that can be hashed; `_thawed` gives it back."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, Mapping):
        return _Settings((name, _frozen(each)) for name, each in value.items())
    return value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Settings):
        return {name: _thawed(each) for name, each in value}
    return [_thawed(each) for each in value] if isinstance(value, tuple) else value


class _Settings(tuple):
    """The items of a JSON object."""

    __slots__ = ()


def _require(name: str, value: Any, accepted: tuple[Any, ...] | None) -> None:
    if accepted is not None and value not in accepted:
        raise ValueError(
            f"{name}={value!r} is not supported; accepted: {', '.join(map(repr, accepted))}."
        )


def read_settings(kind: Any, scheduler_class: str, config: Mapping[str, Any]) -> Any:
    """The dataclass `kind` from the `scheduler_config.json` of the one class that it stands for.

    Raises:
      ValueError: another class, an unknown setting, or a value that is not supported.
    """
    if (name := config.get("_class_name", scheduler_class)) != scheduler_class:
        raise ValueError(f"{kind.__name__} is read from a {scheduler_class}; got {name!r}.")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"Unknown scheduler settings {', '.join(unknown)} for {scheduler_class}; known are "
            f"{', '.join(sorted(known))}."
        )
    return kind(**{name: checked(known[name], value) for name, value in settings.items()})


def checked(field: dataclasses.Field, value: Any) -> Any:
    """A JSON value as the field's type: bool, int, float or str; null where that means unset."""
    annotation = str(field.type)
    if value is None:
        # diffusers writes null for an unset option, whatever its type, and reads it as false
        if "bool" in annotation:
            return False
        if field.default is None:
            return None
    elif "bool" in annotation:
        if isinstance(value, bool):
            return value
    elif "str" in annotation:
        if isinstance(value, str):
            return value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if "float" in annotation and (math.isfinite(value) or value == field.default):
            return float(value)
        if "int" in annotation and value == int(value):
            return int(value)
    raise ValueError(f"{field.name} must be a {annotation}; got {value!r}.")


# ---- host-side tables ----


def float32_linspace(start: float, stop: float, num: int) -> np.ndarray:
    """`torch.linspace` in float32: each half counted from its own end, one rounding per entry."""
    if num == 1:
        return np.asarray([start], np.float32)
    first, last = np.float32(start), np.float32(stop)
    step = np.float64(np.float32((last - first) / np.float32(num - 1)))
    index = np.arange(num)
    values = np.where(index < num // 2, first + step * index, last - step * (num - 1 - index))
    return values.astype(np.float32)


@functools.lru_cache(maxsize=32)
def alphas_cumprod(schedule: NoiseSchedule) -> np.ndarray:
    """ᾱ_t for every training timestep, float32 [num_train_timesteps], read-only.

    Raises:
      ValueError: a model of a flow, which has none.
    """
    if schedule.prediction_type == "flow_prediction":
        raise ValueError(
            "prediction_type='flow_prediction' is that of a model of a flow, which has no ᾱ_t: of "
            "the samplers over a table of betas 'unipc' alone draws from it."
        )
    table = _cumprod(1 - _betas(schedule))
    table.flags.writeable = False
    return table


def _betas(schedule: NoiseSchedule) -> np.ndarray:
    count, start, end = schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end
    if schedule.trained_betas is not None:
        betas = np.asarray(schedule.trained_betas, np.float32)
    elif schedule.beta_schedule == "linear":
        betas = float32_linspace(start, end, count)
    elif schedule.beta_schedule == "scaled_linear":
        betas = np.square(float32_linspace(start**0.5, end**0.5, count))
    else:  # squaredcos_cap_v2: Nichol & Dhariwal, arXiv 2102.09672, equation 17

        def alpha_bar(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        steps = [1 - alpha_bar((i + 1) / count) / alpha_bar(i / count) for i in range(count)]
        betas = np.minimum(np.asarray(steps), 0.999).astype(np.float32)
    return _rescale_zero_terminal_snr(betas) if schedule.rescale_betas_zero_snr else betas


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and stretches √ᾱ so that it ends at 0 (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(_cumprod(1 - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alphas_bar = np.square(root)
    return 1 - np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    """Accumulates in float64 and rounds each entry to float32, as torch does."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def inference_timesteps(
    schedule: NoiseSchedule, num_inference_steps: int, spacing: str
) -> np.ndarray:
    """The timesteps of table 2 in arXiv 2305.08891, descending, float64 [num_inference_steps].

    "linspace" is left unrounded: DDIM rounds it, Euler does not. For a few step counts (61 of 1000,
    for one) "trailing" in diffusers yields one more timestep, −1, through a float rounding; it is
    dropped here.

    Raises:
      ValueError: a step count outside [1, num_train_timesteps], or a timestep that the model never
        saw (`steps_offset` too large).
    """
    count = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= count:
        raise ValueError(
            f"num_inference_steps must be between 1 and {count}, the timesteps that the model was "
            f"trained on; got {num_inference_steps}."
        )
    if spacing == "linspace":
        return np.linspace(0, count - 1, num_inference_steps)[::-1]
    if spacing == "leading":
        ratio = count // num_inference_steps
        timesteps = np.arange(num_inference_steps)[::-1] * float(ratio) + schedule.steps_offset
    else:
        ratio = count / num_inference_steps
        timesteps = np.round(np.arange(count, 0, -ratio))[:num_inference_steps] - 1
    if timesteps[-1] < 0 or timesteps[0] >= count:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} with timestep_spacing={spacing!r} and "
            f"steps_offset={schedule.steps_offset} asks for timesteps {int(timesteps[-1])}…"
            f"{int(timesteps[0])}, outside 0…{count - 1}; use fewer steps or a smaller offset."
        )
    return timesteps


# ---- training side ----


def _coefficients(
    schedule: NoiseSchedule, timesteps: Int[Array, "..."] | int, rank: int
) -> tuple[Array, Array]:
    """√ᾱ_t and √(1−ᾱ_t), float32, shaped to broadcast against `[B, *X, C]` arrays of this rank."""
    alpha_bar = jnp.asarray(alphas_cumprod(schedule))[timesteps]
    if alpha_bar.ndim:
        alpha_bar = jnp.expand_dims(alpha_bar, tuple(range(alpha_bar.ndim, rank)))
    return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def add_noise(
    schedule: NoiseSchedule,
    x0: Float[Array, "B *X C"],
    noise: Float[Array, "B *X C"],
    timesteps: Int[Array, "..."] | int,
) -> Float[Array, "B *X C"]:
    """x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε. `timesteps`: integers, [B] or a scalar."""
    signal, sigma = _coefficients(schedule, timesteps, x0.ndim)
    return signal * x0 + sigma * noise


def velocity(
    schedule: NoiseSchedule,
    x0: Float[Array, "B *X C"],
    noise: Float[Array, "B *X C"],
    timesteps: Int[Array, "..."] | int,
) -> Float[Array, "B *X C"]:
    """v = √ᾱ_t·ε − √(1−ᾱ_t)·x₀ (arXiv 2202.00512, appendix D)."""
    signal, sigma = _coefficients(schedule, timesteps, x0.ndim)
    return signal * noise - sigma * x0


def training_target(
    schedule: NoiseSchedule,
    x0: Float[Array, "B *X C"],
    noise: Float[Array, "B *X C"],
    timesteps: Int[Array, "..."] | int,
) -> Float[Array, "B *X C"]:
    """What the model is trained to predict: ε, v or x₀ by `schedule.prediction_type`."""
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return x0
    return velocity(schedule, x0, noise, timesteps)
