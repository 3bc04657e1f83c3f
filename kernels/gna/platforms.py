"""Platforms: on which kind of device a call runs."""

import jax


def default_platform() -> str:
    """That of jax's default device: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
