"""Samplers against diffusers' schedulers step by step; the training side against its equations."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.methods.sampling import (
    SAMPLER_KINDS,
    FlowMatchSchedule,
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    ddim_sampler,
    euler_sampler,
    flow_euler_sampler,
    make_sampler,
    training_target,
    velocity,
)

# Raised inside diffusers, which hands torch tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
SHAPE = (2, 4, 4, 3)

# Each step is about ten float32 operations (2**-24 = 6e-8 relative each), and the largest amplifies
# an input by 1/sqrt(alpha_bar) <= 15 on these schedules: 10 * 6e-8 * 15 = 9e-6 of the largest entry
# of the sample before or after (an Euler step from sigma = 4096 cancels almost all of x).
TOLERANCE = 1e-5

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

DDIM_OPTIONS = {
    "defaults": {},
    "stable diffusion": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.5},
    "trained betas": {
        "trained_betas": np.linspace(1e-4, 0.09, 60).tolist(),
        "num_train_timesteps": 60,
    },
    "thresholding": {
        "thresholding": True,
        "sample_max_value": 1.5,
        "dynamic_thresholding_ratio": 0.9,
    },
    "zero snr": {"rescale_betas_zero_snr": True},
}
EULER_OPTIONS = {
    "defaults": {},
    "stable diffusion": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "interpolation_type": "linear",
    },
    "log linear": {"interpolation_type": "log_linear"},
    "karras": {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"},
    "karras, bounded": {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
    "exponential": {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
    "beta": {"use_beta_sigmas": True, "steps_offset": 3},
    "cosine, continuous": {"beta_schedule": "squaredcos_cap_v2", "timestep_type": "continuous"},
    "zero snr": {"rescale_betas_zero_snr": True},
}


@pytest.fixture(scope="module")
def schedulers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


@jax.jit
def jitted_step(sampler, x, output, i, noise, memory):
    """The tables are arguments: one compilation serves every schedule of one kind and length."""
    return sampler.scale(x, i), sampler.advance(x, output, i, noise, memory)


def assert_close(actual, expected, before=0.0):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.isfinite(expected).all()
    largest = max(np.abs(expected).max(), np.abs(before).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * largest)


def compare_run(torch, reference, sampler, reference_step):
    """Feeds both the same x and model outputs; continues from the reference's x.

    What a sampler remembers is its own all along.
    """
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(
        sampler.timesteps, reference.timesteps.numpy()[: sampler.num_steps], rtol=1e-6, atol=1e-4
    )
    np.testing.assert_allclose(
        sampler.init_noise_sigma, float(reference.init_noise_sigma), rtol=1e-6
    )
    x = rng.normal(size=SHAPE).astype(np.float32) * sampler.init_noise_sigma
    memory = sampler.memory(jnp.asarray(x))
    for i in range(sampler.num_steps):
        timestep = reference.timesteps[i]
        output, noise = rng.normal(size=(2, *SHAPE)).astype(np.float32)
        scaled = reference.scale_model_input(torch.from_numpy(x), timestep)
        expected = reference_step(torch.from_numpy(output), timestep, torch.from_numpy(x), noise)
        actual_scaled, (actual, memory) = jitted_step(
            sampler, x, output, i, noise if sampler.stochastic else None, memory
        )
        assert_close(actual_scaled, scaled)
        assert_close(actual, expected, before=x)
        x = expected.numpy()


# ---- DDIM ----


@pytest.mark.parametrize("option", DDIM_OPTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_steps_equal_diffusers(torch, schedulers, prediction_type, spacing, option):
    settings = DDIM_OPTIONS[option] | {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
    }
    schedule = NoiseSchedule.from_config({"_class_name": "DDIMScheduler", **settings})
    reference = schedulers.DDIMScheduler(**settings)
    # Bit for bit, but for zero terminal SNR: its square root goes through torch's vector library,
    # which rounds some entries the other way (2**-24), and the shift to zero amplifies that.
    np.testing.assert_allclose(
        alphas_cumprod(schedule),
        reference.alphas_cumprod.numpy(),
        rtol=0,
        atol=3e-7 if schedule.rescale_betas_zero_snr else 0,
    )
    for eta in (0.0, 0.7):
        reference.set_timesteps(6)
        sampler = make_sampler(schedule, num_inference_steps=6, eta=eta)

        def step(output, timestep, x, noise, eta=eta):
            noise = torch.from_numpy(noise) if eta else None
            return reference.step(output, timestep, x, eta=eta, variance_noise=noise).prev_sample

        compare_run(torch, reference, sampler, step)


def test_ddim_from_a_pndm_folder_equals_diffusers_ddim_from_the_same_config(torch, schedulers):
    reference = schedulers.DDIMScheduler.from_config(STABLE_DIFFUSION)
    reference.set_timesteps(7)
    sampler = make_sampler(NoiseSchedule.from_config(STABLE_DIFFUSION), num_inference_steps=7)
    compare_run(torch, reference, sampler, lambda o, t, x, _: reference.step(o, t, x).prev_sample)


def test_ddim_refuses_noise_prediction_at_zero_signal():
    schedule = NoiseSchedule(
        rescale_betas_zero_snr=True, clip_sample=False, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="zero signal"):
        ddim_sampler(schedule, 5)


# ---- Euler ----


@pytest.mark.parametrize("option", EULER_OPTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_euler_steps_equal_diffusers(torch, schedulers, prediction_type, spacing, option):
    settings = EULER_OPTIONS[option] | {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
    }
    schedule = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", **settings})
    reference = schedulers.EulerDiscreteScheduler(**settings)
    reference.set_timesteps(6)
    reference.set_begin_index(0)
    sampler = make_sampler(schedule, num_inference_steps=6)
    sigma, sigma_next = (reference.sigmas.double().numpy()[rows] for rows in np.s_[:6, 1:7])
    np.testing.assert_allclose(sampler.input_scale, 1 / np.sqrt(sigma**2 + 1), rtol=1e-6)
    np.testing.assert_allclose(sampler.keep, sigma_next / sigma, rtol=2e-6)
    compare_run(torch, reference, sampler, lambda o, t, x, _: reference.step(o, t, x).prev_sample)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_euler_churn_equals_diffusers(torch, schedulers, monkeypatch, prediction_type):
    from diffusers.schedulers import scheduling_euler_discrete

    settings = {"prediction_type": prediction_type, "beta_schedule": "scaled_linear"}
    churn = {"s_churn": 2.0, "s_tmin": 0.5, "s_tmax": 50.0, "s_noise": 1.01}
    reference = schedulers.EulerDiscreteScheduler(**settings)
    reference.set_timesteps(6)
    sampler = euler_sampler(NoiseSchedule.from_config(settings), 6, **churn)
    assert sampler.stochastic and sampler.noise_scale[-1] == 0 and sampler.noise_scale[1] > 0

    def step(output, timestep, x, noise):
        monkeypatch.setattr(
            scheduling_euler_discrete, "randn_tensor", lambda *_, **__: torch.from_numpy(noise)
        )
        return reference.step(output, timestep, x, **churn).prev_sample

    compare_run(torch, reference, sampler, step)


@pytest.mark.parametrize("kind", ["ddim", "euler"])
def test_trailing_never_runs_the_timestep_minus_one(schedulers, kind):
    """61 of 1000 steps: a rounding gives diffusers a 62nd timestep, -1; ours stops before it."""
    name = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}[kind]
    reference = getattr(schedulers, name)(timestep_spacing="trailing")
    reference.set_timesteps(61)
    sampler = make_sampler(NoiseSchedule(timestep_spacing="trailing"), kind, num_inference_steps=61)
    assert len(sampler.timesteps) == 61 and reference.timesteps[-1] == -1
    np.testing.assert_array_equal(sampler.timesteps, reference.timesteps.numpy()[:61])


# ---- samplers that are one recurrence ----

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR_OPTIONS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False, **SCALED}),
    "ddpm, clipped": ("DDPMScheduler", {"variance_type": "fixed_large"}),
    "ddpm, thresholding": ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}),
    "ancestral": ("EulerAncestralDiscreteScheduler", SCALED),
    "ancestral, zero snr": ("EulerAncestralDiscreteScheduler", {"rescale_betas_zero_snr": True}),
    "dpm++": ("DPMSolverMultistepScheduler", SCALED),
    "dpm++, karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, **SCALED}),
    "dpm++, heun, exponential": (
        "DPMSolverMultistepScheduler",
        {"solver_type": "heun", "use_exponential_sigmas": True},
    ),
    "dpm++, first order": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "dpm++, cosine, cut": (
        "DPMSolverMultistepScheduler",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "lambda_min_clipped": -5.1,
            "use_karras_sigmas": True,
            "final_sigmas_type": "sigma_min",
            "lower_order_final": False,
        },
    ),
    "dpm++, noisy": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++, noisy, heun": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "thresholding": True},
    ),
    "unipc": ("UniPCMultistepScheduler", SCALED),
    "unipc, third order": ("UniPCMultistepScheduler", {"solver_order": 3, **SCALED}),
    "unipc, bh1, uncorrected start": (
        "UniPCMultistepScheduler",
        {"solver_type": "bh1", "disable_corrector": [0, 2], "final_sigmas_type": "sigma_min"},
    ),
    "unipc, karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True, **SCALED}),
    "lcm": ("LCMScheduler", {}),
    "lcm, clipped": ("LCMScheduler", {"clip_sample": True, "original_inference_steps": 40}),
}


@pytest.mark.parametrize("option", LINEAR_OPTIONS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_linear_samplers_equal_diffusers(torch, schedulers, monkeypatch, prediction_type, option):
    name, settings = LINEAR_OPTIONS[option]
    if name.startswith("EulerAncestral") and prediction_type == "sample":
        pytest.skip("diffusers has no such step")
    settings = settings | {"prediction_type": prediction_type}
    for spacing in SPACINGS:
        reference = getattr(schedulers, name)(**settings | {"timestep_spacing": spacing})
        config = json.loads(json.dumps(dict(reference.config))) | {"_class_name": name}
        reference.set_timesteps(6)
        if hasattr(reference, "set_begin_index"):
            reference.set_begin_index(0)  # two equal timesteps would have it start at the second
        sampler = make_sampler(NoiseSchedule.from_config(config), num_inference_steps=6)

        def step(output, timestep, x, noise, reference=reference):
            module = __import__(type(reference).__module__, fromlist=["randn_tensor"])
            if hasattr(module, "randn_tensor"):
                monkeypatch.setattr(
                    module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise)
                )
            return reference.step(output, timestep, x).prev_sample

        compare_run(torch, reference, sampler, step)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift": 3.0},
        {"shift": 2.0, "use_karras_sigmas": True},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift_terminal": 0.1},
        {"stochastic_sampling": True},
    ],
    ids=str,
)
def test_flow_matching_steps_equal_diffusers(torch, schedulers, monkeypatch, settings):
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as module

    reference = schedulers.FlowMatchEulerDiscreteScheduler(**settings)
    schedule = FlowMatchSchedule.from_config(json.loads(json.dumps(dict(reference.config))))
    assert FlowMatchSchedule.from_config(schedule.to_config()) == schedule
    mu = schedule.mu_of(1024) if schedule.use_dynamic_shifting else None
    reference.set_timesteps(6, mu=mu)
    sampler = flow_euler_sampler(schedule, 6, mu=mu)

    def step(output, timestep, x, noise):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
        return reference.step(output, timestep, x).prev_sample

    np.testing.assert_allclose(sampler.timesteps, reference.timesteps.numpy(), rtol=1e-6)
    rng = np.random.default_rng(0)
    x, memory = rng.normal(size=SHAPE).astype(np.float32), sampler.memory(jnp.zeros(SHAPE))
    for i in range(6):
        output, noise = rng.normal(size=(2, *SHAPE)).astype(np.float32)
        wanted = step(torch.from_numpy(output), reference.timesteps[i], torch.from_numpy(x), noise)
        _, (found, memory) = jitted_step(
            sampler, x, output, i, noise if sampler.stochastic else None, memory
        )
        assert_close(found, wanted, before=x)
        x = wanted.numpy()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_shift_type": "cubic"}, "exponential, linear"),
        ({"invert_sigmas": True}, "invert"),
        ({"shift": 0.0}, "positive"),
        ({"sigma_min": 0.1}, "Unknown scheduler settings sigma_min"),
        ({"_class_name": "DDIMScheduler"}, "got 'DDIMScheduler'"),
        ({"shift": "3"}, "shift must be a float; got '3'"),
    ],
)
def test_unsupported_settings_of_a_flow_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSchedule.from_config(settings)


def test_a_dynamic_shift_needs_its_exponent():
    with pytest.raises(ValueError, match="needs `mu`"):
        flow_euler_sampler(FlowMatchSchedule(use_dynamic_shifting=True), 4)
    with pytest.raises(ValueError, match="fixed shift"):
        flow_euler_sampler(FlowMatchSchedule(), 4, mu=1.0)


# ---- choosing a sampler, reading configurations ----


def test_the_default_kind_follows_the_class_and_explicit_kinds_override():
    pndm = NoiseSchedule.from_config(STABLE_DIFFUSION)
    euler = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"})
    for schedule, kind, own in (
        (pndm, None, "ddim"),
        (pndm, "euler", "euler"),
        (euler, None, "euler"),
    ):
        received, expected = (make_sampler(schedule, k, num_inference_steps=2) for k in (kind, own))
        jax.tree.map(np.testing.assert_array_equal, received, expected)
    assert make_sampler(pndm, num_inference_steps=2).input_scale[0] == 1  # x itself
    assert make_sampler(euler, num_inference_steps=2).input_scale[0] < 1
    # An unset spacing is the sampling class's own default, as in diffusers.
    np.testing.assert_array_equal(make_sampler(euler, num_inference_steps=2).timesteps, [999, 0])
    np.testing.assert_array_equal(
        make_sampler(euler, "ddim", num_inference_steps=2).timesteps, [500, 0]
    )


# Settings that a file may hold or not: what is silent is the sampling class's own default.
GRID = [
    {},
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 2.0},
    {"clip_sample": None},
    {"thresholding": True, "sample_max_value": 1.5},
    {"set_alpha_to_one": False},
    {"steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace", "prediction_type": "v_prediction"},
    {"final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True},
    {"solver_order": 1},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"lambda_min_clipped": -3.0},
    {"variance_type": "fixed_large"},
    {"original_inference_steps": 40, "timestep_scaling": 5.0},
    {"skip_prk_steps": True},
]
TARGETS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
OWNERS = [
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DEISMultistepScheduler",
]


@pytest.mark.parametrize("owner", OWNERS)
def test_a_sampler_reads_another_class_configuration_as_diffusers_does(schedulers, owner):
    """The same tables as from the complete settings that diffusers makes of the file.

    With complete settings every sampler is compared step by step above.
    """
    assert list(TARGETS) == list(SAMPLER_KINDS)
    for settings in GRID:
        config = {"_class_name": owner, **SCALED, **settings}
        own = getattr(schedulers, owner).from_config(config)
        for kind, name in TARGETS.items():
            reference = getattr(schedulers, name).from_config(own.config)
            known = set(inspect.signature(type(reference).__init__).parameters)
            full = {key: value for key, value in reference.config.items() if key in known}
            sampler, complete = (
                make_sampler(NoiseSchedule.from_config(each), kind, num_inference_steps=6)
                for each in (config, {**full, "_class_name": name})
            )
            reference.set_timesteps(6)
            np.testing.assert_allclose(sampler.timesteps, reference.timesteps[:6], atol=1e-4)
            for field in dataclasses.fields(sampler):
                received, expected = (getattr(each, field.name) for each in (sampler, complete))
                assert np.array_equal(received, expected), (kind, settings, field.name)


def test_schedulers_whose_steps_are_not_known_lend_their_betas():
    heun = {"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": False}
    schedule = NoiseSchedule.from_config(heun | {"history": [1, {"a": [2]}]})
    assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)  # that class's defaults
    assert schedule.to_config()["history"] == [1, {"a": [2]}]
    assert NoiseSchedule.from_config(schedule.to_config()) == schedule
    hash(schedule)
    with pytest.raises(ValueError, match=r"HeunDiscreteScheduler.*\(--sampler\), such as 'euler'"):
        make_sampler(schedule, num_inference_steps=2)
    assert make_sampler(schedule, "ddim", num_inference_steps=2).num_steps == 2
    unheard = NoiseSchedule.from_config({"_class_name": "OwnScheduler", "own": True, **SCALED})
    plain = NoiseSchedule.from_config(SCALED)
    np.testing.assert_array_equal(alphas_cumprod(unheard), alphas_cumprod(plain))
    parallel = NoiseSchedule.from_config({"_class_name": "DDPMParallelScheduler"})
    assert make_sampler(parallel, num_inference_steps=2).stochastic  # DDPM's steps
    old = {"predict_epsilon": False, "num_inference_steps": None, "tensor_format": "pt"}
    assert NoiseSchedule.from_config(old).prediction_type == "sample"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dpm", "num_inference_steps": 5}, "accepted: ddim, ddpm, euler, euler-ancestral"),
        ({"kind": "unipc", "num_inference_steps": 1000}, "between 1 and"),
        ({"kind": "lcm", "num_inference_steps": 51}, "original_inference_steps=50"),
        ({"kind": "dpm++", "num_inference_steps": 5, "eta": 1.0}, "takes neither eta nor s_churn"),
        ({"kind": "ddim", "num_inference_steps": 0}, "between 1 and"),
        ({"kind": "euler", "num_inference_steps": 1001}, "between 1 and"),
        ({"kind": "ddim", "num_inference_steps": 5, "eta": 1.5}, "between 0"),
        ({"kind": "ddim", "num_inference_steps": 5, "s_churn": 1.0}, "takes eta"),
        ({"kind": "euler", "num_inference_steps": 5, "eta": 1.0}, "takes s_churn"),
        ({"kind": "euler", "num_inference_steps": 5, "s_churn": -1.0}, "negative"),
        ({"kind": "ddim", "num_inference_steps": 1000}, "smaller offset"),
    ],
)
def test_wrong_calls_of_make_sampler_say_what_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(NoiseSchedule(steps_offset=1, timestep_spacing="leading"), **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "has no beta_schedule"),
        ({"_class_name": ["a", "B"]}, "must be a scheduler's name"),
        ({"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0, **SCALED}, "snr_shift"),
        ({"predict_epsilon": False, "prediction_type": "epsilon"}, "accepted: 'sample'"),
        ({"use_ab_lambdas": True}, "Unknown scheduler setting use_ab_lambdas=True"),
        ({"inert": 1}, "Unknown scheduler setting"),
        ({"beta_schedule": "sigmoid"}, "'squaredcos_cap_v2'"),
        ({"prediction_type": "flow_prediction"}, "'v_prediction'"),
        ({"timestep_spacing": "even"}, "'trailing'"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"interpolation_type": "cubic"}, "'log_linear'"),
        ({"final_sigmas_type": "one"}, "'sigma_min'"),
        ({"timestep_type": "other"}, "'continuous'"),
        ({"beta_start": "0.1"}, "beta_start must be a float; got '0.1'"),
        ({"beta_start": None}, "beta_start must be a float; got None"),
        ({"clip_sample": 1}, "clip_sample must be a bool"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps must be a int"),
        ({"num_train_timesteps": 0}, "at least 1"),
        ({"trained_betas": [0.1, 0.2]}, "got 2"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "At most one"),
    ],
)
def test_unsupported_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("dpm++", {"solver_order": 3}, "solver_order=3"),
        ("dpm++", {"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ("dpm++", {"use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ("unipc", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("unipc", {"predict_x0": False}, "predict_x0"),
        ("unipc", {"lower_order_final": False}, "lower_order_final"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "fixed_large_log"),
        ("euler-ancestral", {"prediction_type": "sample"}, "not sample"),
        ("ddpm", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "zero signal"),
    ],
)
def test_settings_that_a_sampler_cannot_honor_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(NoiseSchedule(**settings), kind, num_inference_steps=5)


def test_a_solver_takes_its_own_type_from_the_other_solvers_configuration():
    """As diffusers does when one scheduler is made from another's configuration."""
    for kind, other in (("dpm++", "bh2"), ("unipc", "heun")):
        own, foreign = (
            make_sampler(NoiseSchedule(solver_type=each), kind, num_inference_steps=5)
            for each in (None, other)
        )
        np.testing.assert_array_equal(own.weights, foreign.weights)


def test_configurations_round_trip_and_load_in_diffusers(schedulers):
    every = [
        *(("DDIMScheduler", settings) for settings in DDIM_OPTIONS.values()),
        *(("EulerDiscreteScheduler", settings) for settings in EULER_OPTIONS.values()),
        *LINEAR_OPTIONS.values(),
    ]
    for name, settings in every:
        schedule = NoiseSchedule.from_config({"_class_name": name, **settings})
        config = json.loads(json.dumps(schedule.to_config()))
        assert NoiseSchedule.from_config(config) == schedule
        reference = getattr(schedulers, name)(**settings)
        for key, value in config.items():
            if not key.startswith("_"):
                assert reference.config[key] == value
    written = NoiseSchedule.from_config(STABLE_DIFFUSION).to_config()
    original = {k: v for k, v in STABLE_DIFFUSION.items() if not k.startswith("_diffusers")}
    assert written.items() >= original.items()
    assert hash(NoiseSchedule.from_config(STABLE_DIFFUSION))


def test_noise_is_demanded_exactly_when_it_is_used():
    x, schedule = jnp.ones(SHAPE), NoiseSchedule()
    for kind, arguments in (("ddim", {"eta": 1.0}), ("euler", {"s_churn": 1.0})):
        noisy = make_sampler(schedule, kind, num_inference_steps=2, **arguments)
        with pytest.raises(ValueError, match="pass unit normal"):
            noisy.advance(x, x, 0, None, noisy.memory(x))
        plain = make_sampler(schedule, kind, num_inference_steps=2)
        with pytest.raises(ValueError, match="takes no noise"):
            plain.advance(x, x, 0, x, plain.memory(x))


# ---- training side ----


def test_training_functions_equal_diffusers(torch, schedulers):
    settings = DDIM_OPTIONS["stable diffusion"]
    schedule = NoiseSchedule.from_config(settings)
    reference = schedulers.DDIMScheduler(**settings)
    x0, noise = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    timesteps = jnp.array([3, 977])
    tensors = [torch.from_numpy(np.array(array)) for array in (x0, noise, timesteps)]
    assert_close(add_noise(schedule, x0, noise, timesteps), reference.add_noise(*tensors))
    assert_close(velocity(schedule, x0, noise, timesteps), reference.get_velocity(*tensors))
    one = add_noise(schedule, x0, noise, 977)
    np.testing.assert_allclose(one[1], add_noise(schedule, x0, noise, timesteps)[1], rtol=1e-6)


def test_the_target_is_what_the_prediction_type_names():
    x0, noise = jax.random.normal(jax.random.key(2), (2, 3, 4, 4, 1))
    timesteps = jnp.array([100, 400, 700])
    signal, sigma = (
        np.sqrt(level)[timesteps][:, None, None, None]
        for level in (alphas_cumprod(NoiseSchedule()), 1 - alphas_cumprod(NoiseSchedule()))
    )
    expected = {"epsilon": noise, "sample": x0, "v_prediction": signal * noise - sigma * x0}
    for name in PREDICTION_TYPES:
        schedule = NoiseSchedule(prediction_type=name)
        assert_close(training_target(schedule, x0, noise, timesteps), expected[name])


def test_sampling_an_oracle_recovers_the_image():
    """A model that knows the answer is driven to x0 by every sampler, jitted over a scan."""
    x0 = jax.random.uniform(jax.random.key(3), SHAPE, minval=-1, maxval=1)
    schedule = dataclasses.replace(
        NoiseSchedule.from_config(STABLE_DIFFUSION), prediction_type="sample", set_alpha_to_one=True
    )

    @jax.jit
    def run(sampler, x):
        def body(carry, i):
            x, memory = carry
            fresh = jax.random.normal(jax.random.key(i), SHAPE) if sampler.stochastic else None
            return sampler.advance(x, x0, i, fresh, memory), None

        x = x * sampler.init_noise_sigma
        return jax.lax.scan(body, (x, sampler.memory(x)), jnp.arange(sampler.num_steps))[0][0]

    noise = jax.random.normal(jax.random.key(0), SHAPE)
    for kind in set(SAMPLER_KINDS) - {"euler-ancestral"}:
        assert_close(run(make_sampler(schedule, kind, num_inference_steps=5), noise), x0)
