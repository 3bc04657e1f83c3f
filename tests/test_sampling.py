"""Samplers against diffusers' schedulers step by step; the training side against its equations."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conceptax.methods.sampling import (
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    ddim_sampler,
    euler_sampler,
    make_sampler,
    prediction_to_epsilon,
    prediction_to_x0,
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
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    "clip_sample": False,
}  # fmt: skip

DDIM_OPTIONS = {
    "defaults": {},
    "stable diffusion": {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.5},
    "trained betas": {"trained_betas": np.linspace(1e-4, 0.09, 60).tolist(),
                      "num_train_timesteps": 60},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5,
                     "dynamic_thresholding_ratio": 0.9},
    "zero snr": {"rescale_betas_zero_snr": True},
}  # fmt: skip
EULER_OPTIONS = {
    "defaults": {},
    "stable diffusion": {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "steps_offset": 1, "interpolation_type": "linear",
    },
    "log linear": {"interpolation_type": "log_linear"},
    "karras": {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"},
    "karras, bounded": {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
    "exponential": {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
    "beta": {"use_beta_sigmas": True, "steps_offset": 3},
    "cosine, continuous": {"beta_schedule": "squaredcos_cap_v2", "timestep_type": "continuous"},
    "zero snr": {"rescale_betas_zero_snr": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def schedulers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


@jax.jit
def jitted_step(sampler, x, output, i, noise):
    """The tables are arguments: one compilation serves every schedule of one kind and length."""
    return sampler.scale(x, i), sampler.step(x, output, i, noise)


def assert_close(actual, expected, before=0.0):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.isfinite(expected).all()
    largest = max(np.abs(expected).max(), np.abs(before).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * largest)


def compare_run(torch, reference, sampler, reference_step):
    """Feeds both the same x and model outputs; continues from the reference's x."""
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(
        sampler.timesteps, reference.timesteps.numpy()[: sampler.num_steps], rtol=1e-6, atol=1e-4
    )
    np.testing.assert_allclose(
        sampler.init_noise_sigma, float(reference.init_noise_sigma), rtol=1e-6
    )
    x = rng.normal(size=SHAPE).astype(np.float32) * sampler.init_noise_sigma
    for i in range(sampler.num_steps):
        timestep = reference.timesteps[i]
        output, noise = rng.normal(size=(2, *SHAPE)).astype(np.float32)
        scaled = reference.scale_model_input(torch.from_numpy(x), timestep)
        expected = reference_step(torch.from_numpy(output), timestep, torch.from_numpy(x), noise)
        actual_scaled, actual = jitted_step(
            sampler, x, output, i, noise if sampler.stochastic else None
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
        "prediction_type": prediction_type, "timestep_spacing": spacing,
    }  # fmt: skip
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
        "prediction_type": prediction_type, "timestep_spacing": spacing,
    }  # fmt: skip
    schedule = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", **settings})
    reference = schedulers.EulerDiscreteScheduler(**settings)
    reference.set_timesteps(6)
    reference.set_begin_index(0)
    sampler = make_sampler(schedule, num_inference_steps=6)
    np.testing.assert_allclose(sampler.sigma, reference.sigmas.numpy()[:6], rtol=1e-6)
    np.testing.assert_allclose(sampler.sigma_next, reference.sigmas.numpy()[1:7], rtol=1e-6)
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


# ---- choosing a sampler, reading configurations ----


def test_the_default_kind_follows_the_class_and_explicit_kinds_override():
    pndm = NoiseSchedule.from_config(STABLE_DIFFUSION)
    assert type(make_sampler(pndm, num_inference_steps=2)).__name__ == "DDIMSampler"
    assert type(make_sampler(pndm, "euler", num_inference_steps=2)).__name__ == "EulerSampler"
    euler = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"})
    assert type(make_sampler(euler, num_inference_steps=2)).__name__ == "EulerSampler"
    # An unset spacing is the sampling class's own default, as in diffusers.
    np.testing.assert_array_equal(make_sampler(euler, num_inference_steps=2).timesteps, [999, 0])
    np.testing.assert_array_equal(
        make_sampler(euler, "ddim", num_inference_steps=2).timesteps, [500, 0]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dpm", "num_inference_steps": 5}, "accepted: ddim, euler"),
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
        ({"_class_name": "UniPCMultistepScheduler"}, "accepted are DDIMScheduler"),
        ({"use_lu_lambdas": True}, "Unknown scheduler setting use_lu_lambdas=True"),
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


def test_configurations_round_trip_and_load_in_diffusers(schedulers):
    for options in (DDIM_OPTIONS, EULER_OPTIONS):
        for settings in options.values():
            name = "DDIMScheduler" if options is DDIM_OPTIONS else "EulerDiscreteScheduler"
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
    x = jnp.ones(SHAPE)
    schedule = NoiseSchedule()
    for kind, arguments in (("ddim", {"eta": 1.0}), ("euler", {"s_churn": 1.0})):
        with pytest.raises(ValueError, match="pass unit normal"):
            make_sampler(schedule, kind, num_inference_steps=2, **arguments).step(x, x, 0, None)
        with pytest.raises(ValueError, match="takes no noise"):
            make_sampler(schedule, kind, num_inference_steps=2).step(x, x, 0, x)


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


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_converts_back_to_image_and_noise(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    x0, noise = jax.random.normal(jax.random.key(2), (2, 3, 4, 4, 1))
    timesteps = jnp.array([100, 400, 700])  # away from the ends, where the inversion is ill-posed
    x_t = add_noise(schedule, x0, noise, timesteps)
    target = training_target(schedule, x0, noise, timesteps)
    assert_close(prediction_to_x0(schedule, target, x_t, timesteps), x0)
    assert_close(prediction_to_epsilon(schedule, target, x_t, timesteps), noise)


def test_sampling_an_oracle_recovers_the_image():
    """A model that knows the answer is driven to x0 by either sampler, jitted over a scan."""
    x0 = jax.random.uniform(jax.random.key(3), SHAPE, minval=-1, maxval=1)
    schedule = dataclasses.replace(
        NoiseSchedule.from_config(STABLE_DIFFUSION), prediction_type="sample", set_alpha_to_one=True
    )

    @jax.jit
    def run(sampler, x):
        body = lambda x, i: (sampler.step(x, x0, i), None)  # noqa: E731
        return jax.lax.scan(body, x * sampler.init_noise_sigma, jnp.arange(sampler.num_steps))[0]

    noise = jax.random.normal(jax.random.key(0), SHAPE)
    for kind in ("ddim", "euler"):
        assert_close(run(make_sampler(schedule, kind, num_inference_steps=5), noise), x0)
