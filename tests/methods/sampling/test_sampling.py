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
    EDMSchedule,
    FlowMatchSchedule,
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    ddim_sampler,
    edm_sampler,
    empirical_mu,
    euler_sampler,
    flow_euler_sampler,
    make_sampler,
    training_target,
    unipc_sampler,
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
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    sampler = make_sampler(schedule, "ddim", num_inference_steps=7)
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


@pytest.mark.parametrize("option", ["default", "stable diffusion", "karras", "exponential"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_lms_steps_equal_diffusers(torch, schedulers, prediction_type, option):
    settings = {"prediction_type": prediction_type} | {
        name: value
        for name, value in EULER_OPTIONS.get(option, {}).items()
        if name not in ("interpolation_type", "final_sigmas_type")
    }
    schedule = NoiseSchedule.from_config({"_class_name": "LMSDiscreteScheduler", **settings})
    reference = schedulers.LMSDiscreteScheduler(**settings)
    reference.set_timesteps(6)
    reference.set_begin_index(0)
    sampler = make_sampler(schedule, num_inference_steps=6)
    assert sampler.weights.shape == (6, 4) and not sampler.weights[0, 1:].any()
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


# ---- PNDM ----

# step counts, and how many evaluations there are more
PNDM_OPTIONS = {
    "stable diffusion": ((1, 2, 3, 5, 6), STABLE_DIFFUSION),
    "alpha to one": ((6,), {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "defaults": ((4, 6), {}),
    "runge-kutta, offset": ((7,), {"beta_schedule": "scaled_linear", "steps_offset": 1}),
}


@pytest.mark.parametrize("option", PNDM_OPTIONS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pndm_steps_equal_diffusers(torch, schedulers, prediction_type, option):
    counts, settings = PNDM_OPTIONS[option]
    for spacing in SPACINGS:
        config = {**settings, "prediction_type": prediction_type, "timestep_spacing": spacing}
        config["_class_name"] = "PNDMScheduler"
        reference = schedulers.PNDMScheduler.from_config(config)

        def step(output, timestep, x, _, reference=reference):
            return reference.step(output, timestep, x).prev_sample

        for count in counts:
            reference.set_timesteps(count)
            sampler = make_sampler(NoiseSchedule.from_config(config), num_inference_steps=count)
            more = (count > 1) if config.get("skip_prk_steps") else 9
            assert len(reference.timesteps) == sampler.num_steps == count + more
            compare_run(torch, reference, sampler, step)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("skips", [True, False])
def test_pndm_timesteps_equal_diffusers(schedulers, skips, spacing):
    settings = {"skip_prk_steps": skips, "timestep_spacing": spacing}
    reference = schedulers.PNDMScheduler(**settings)
    schedule = NoiseSchedule.from_config({"_class_name": "PNDMScheduler", **settings})
    for count in (*range(4, 50), 100, 999, 1000):
        reference.set_timesteps(count)
        sampler = make_sampler(schedule, num_inference_steps=count)
        np.testing.assert_array_equal(sampler.timesteps, reference.timesteps.numpy())
        assert np.isfinite(sampler.keep).all() and np.isfinite(sampler.weights).all()


# ---- EDM ----

EDM_OPTIONS = {
    "cosmos": {"final_sigmas_type": "sigma_min"},
    "v, exponential": {"prediction_type": "v_prediction", "sigma_schedule": "exponential"},
    "others": {"sigma_max": 30.0, "sigma_min": 0.01, "sigma_data": 1.5, "rho": 5.0},
}


@pytest.mark.parametrize("option", EDM_OPTIONS)
def test_edm_steps_equal_diffusers(torch, schedulers, option):
    reference = schedulers.EDMEulerScheduler(**EDM_OPTIONS[option])
    schedule = EDMSchedule.from_config(json.loads(json.dumps(dict(reference.config))))
    assert EDMSchedule.from_config(schedule.to_config()) == schedule
    void = schedule.final_sigmas_type == "sigma_min"

    def step(output, timestep, x, _=None):
        return reference.step(output, timestep, x).prev_sample

    reference.set_timesteps(6)
    sampler = edm_sampler(schedule, 6)
    assert sampler.num_steps == 6 - void
    compare_run(torch, reference, sampler, step)
    if void:  # what is left out does nothing
        x = torch.ones(SHAPE)
        torch.testing.assert_close(step(7 * x, reference.timesteps[-1], x), x, rtol=0, atol=0)
    for count in (*range(1 + void, 50), 100, 250):
        reference.set_timesteps(count)
        sampler, sigmas = edm_sampler(schedule, count), reference.sigmas.numpy()
        assert sampler.num_steps == count - void
        np.testing.assert_allclose(
            sampler.timesteps, reference.timesteps[: count - void], rtol=2e-7, atol=1e-7
        )
        expected = sigmas[1:].astype(np.float64) / sigmas[:-1]
        np.testing.assert_allclose(sampler.keep, expected[: count - void], rtol=4e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_schedule": "even"}, "karras, exponential; got 'even'"),
        ({"prediction_type": "sample"}, "epsilon, v_prediction; got 'sample'"),
        ({"final_sigmas_type": "one"}, "zero, sigma_min; got 'one'"),
        ({"sigma_min": 90.0}, "below sigma_max"),
        ({"sigma": 1.0}, "Unknown scheduler settings sigma for EDMEulerScheduler"),
        ({"_class_name": "DDIMScheduler"}, "EDMSchedule is read from a EDMEulerScheduler; got"),
    ],
)
def test_unsupported_settings_of_edm_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        EDMSchedule.from_config(settings)


def test_edm_needs_steps_that_go_somewhere():
    for kind, least in (("zero", 1), ("sigma_min", 2)):
        schedule = EDMSchedule(final_sigmas_type=kind)
        assert edm_sampler(schedule, least).num_steps == 1
        with pytest.raises(ValueError, match=f"at least {least}; got {least - 1}"):
            edm_sampler(schedule, least - 1)


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


UNIPC_FLOWS = {
    "wan": {"flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "third order": {"solver_order": 3, "flow_shift": 5.0},
    "bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "first order, noise": {"solver_order": 1, "prediction_type": "epsilon", "flow_shift": 7.0},
    "terminal": {"shift_terminal": 0.1, "final_sigmas_type": "sigma_min"},
    "dynamic": {"use_dynamic_shifting": True, "disable_corrector": [1]},
}


@pytest.mark.parametrize("option", UNIPC_FLOWS)
def test_unipc_over_a_flow_equals_diffusers(torch, schedulers, option):
    settings = {"prediction_type": "flow_prediction", **UNIPC_FLOWS[option]}
    reference = schedulers.UniPCMultistepScheduler(use_flow_sigmas=True, **settings)
    config = json.loads(json.dumps(dict(reference.config)))
    schedule = NoiseSchedule.from_config({"_class_name": "UniPCMultistepScheduler", **config})
    mu = 1.15 if schedule.use_dynamic_shifting else None
    reference.set_timesteps(6, mu=mu)
    reference.set_begin_index(0)
    sampler = unipc_sampler(schedule, 6, mu=mu)
    compare_run(torch, reference, sampler, lambda o, t, x, _: reference.step(o, t, x).prev_sample)
    for count in (*range(1 + bool(schedule.shift_terminal), 60), 100):
        reference.set_timesteps(count, mu=mu)
        sampler = unipc_sampler(schedule, count, mu=mu)
        np.testing.assert_array_equal(sampler.timesteps, reference.timesteps.numpy())
        for table in (sampler.keep, sampler.weights, sampler.correct_weights):
            assert np.isfinite(table).all()
    if mu is None:
        made = make_sampler(schedule, num_inference_steps=count)
        jax.tree.map(np.testing.assert_array_equal, made, sampler)


def test_models_of_a_flow_are_for_unipc_alone():
    flow = NoiseSchedule(use_flow_sigmas=True, prediction_type="flow_prediction")
    x = jnp.zeros(SHAPE)
    with pytest.raises(ValueError, match="which has no ᾱ_t"):
        training_target(flow, x, x, 5)
    for kind in set(SAMPLER_KINDS) - {"unipc"}:
        with pytest.raises(ValueError, match=r"use_flow_sigmas=True|flow_prediction|not sample"):
            make_sampler(flow, kind, num_inference_steps=5)
    with pytest.raises(ValueError, match="whose use_flow_sigmas is true"):
        unipc_sampler(NoiseSchedule(), 5, mu=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        unipc_sampler(flow, 0)
    with pytest.raises(ValueError, match="fixed shift"):
        unipc_sampler(flow, 5, mu=1.0)


def even(count):
    """FLUX's levels."""
    return np.linspace(1.0, 1 / count, count)


def without_zero(count):
    """HunyuanVideo's."""
    return np.linspace(1, 0, count + 1)[:-1]


DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
LADDERS = {
    "stable diffusion 3": ({"shift": 3.0}, None),
    "stable diffusion 3, plain": ({}, None),
    "schnell": ({"shift": 1.0}, even),
    "flux": (DYNAMIC, even),
    "flux 2": (DYNAMIC | {"max_shift": 1.2}, even),
    "flux, default levels": (DYNAMIC, None),
    "hunyuan": ({"shift": 7.0}, without_zero),
    "linear": (DYNAMIC | {"time_shift_type": "linear"}, even),
    "terminal": (DYNAMIC | {"shift_terminal": 0.1}, even),
    "terminal, fixed": ({"shift": 2.5, "shift_terminal": 0.02}, None),
    "karras": (DYNAMIC | {"use_karras_sigmas": True}, even),
    "exponential": ({"shift": 3.0, "use_exponential_sigmas": True}, without_zero),
    "beta": ({"shift": 3.0, "use_beta_sigmas": True}, None),
    "few training timesteps": ({"shift": 1.7, "num_train_timesteps": 330}, None),
}


@pytest.mark.parametrize("ladder", LADDERS)
def test_the_levels_of_a_flow_equal_diffusers_bit_for_bit(schedulers, ladder):
    settings, levels = LADDERS[ladder]
    reference = schedulers.FlowMatchEulerDiscreteScheduler(**settings)
    schedule = FlowMatchSchedule.from_config(json.loads(json.dumps(dict(reference.config))))
    least = 2 if schedule.shift_terminal else 1
    counts = (least, 3, 10, 50) if schedule.use_beta_sigmas else (*range(least, 61), 100, 200)
    for count in counts:
        sigmas = None if levels is None else levels(count)
        mus = [None]
        if schedule.use_dynamic_shifting:
            mus = [schedule.mu_of(tokens) for tokens in (64, 256, 1024, 4096, 4301, 65536)]
            mus.append(empirical_mu(4096, count))
        for mu in mus:
            if sigmas is None:
                reference.set_timesteps(count, mu=mu)
            else:
                reference.set_timesteps(sigmas=sigmas, mu=mu)
            sampler = flow_euler_sampler(schedule, count, sigmas=sigmas, mu=mu)
            np.testing.assert_array_equal(sampler.timesteps, reference.timesteps.numpy())
            np.testing.assert_array_equal(sampler.weights[:, 0], np.diff(reference.sigmas.numpy()))
            assert (sampler.keep == 1).all() and (sampler.estimate == [0, 1, 1]).all()


def test_the_exponents_of_a_shift_equal_diffusers(schedulers):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    for tokens in (16, 256, 1024, 4096, 4300, 4301, 65536):
        assert FlowMatchSchedule().mu_of(tokens) == calculate_shift(tokens)
        for count in (1, 4, 10, 50, 200):
            assert empirical_mu(tokens, count) == compute_empirical_mu(tokens, count)


@pytest.mark.parametrize(
    "sigmas", [[1.0, 0.5], [1.0, 0.5, 0.0], [0.2, 0.5, 0.1], [1.1, 0.5, 0.2], [1.0, np.nan, 0.5]]
)
def test_levels_that_do_not_fall_to_the_last_step_are_refused(sigmas):
    with pytest.raises(ValueError, match="num_inference_steps=3 falling numbers"):
        flow_euler_sampler(FlowMatchSchedule(), 3, sigmas=sigmas)


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
    with pytest.raises(ValueError, match="at least 2; got 1"):
        flow_euler_sampler(FlowMatchSchedule(shift_terminal=0.1), 1)


# ---- choosing a sampler, reading configurations ----


def test_the_default_kind_follows_the_class_and_explicit_kinds_override():
    pndm = NoiseSchedule.from_config(STABLE_DIFFUSION)
    euler = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"})
    for schedule, kind, own in (
        (pndm, None, "pndm"),
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
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
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
            np.testing.assert_allclose(
                sampler.timesteps, reference.timesteps[: sampler.num_steps], atol=1e-4
            )
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
        ({"kind": "pndm", "num_inference_steps": 3}, "of at least 4; got 3"),
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
        ("dpm++", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("unipc", {"use_flow_sigmas": True, "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ("unipc", {"use_flow_sigmas": True, "use_dynamic_shifting": True}, "needs `mu`"),
        ("pndm", {"prediction_type": "sample", "skip_prk_steps": True}, "not sample"),
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
    for kind in set(SAMPLER_KINDS) - {"euler-ancestral", "pndm"}:
        assert_close(run(make_sampler(schedule, kind, num_inference_steps=5), noise), x0)
