"""Platforms: on which kind of device a call runs."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend.backend import backends

# What `jax.lax.platform_dependent` calls a platform.
_LOWERED = {"gpu": ("cuda", "rocm")}

_traced: contextvars.ContextVar[str | None] = contextvars.ContextVar("traced", default=None)


def default_platform() -> str:
    """That which is traced for, or else that of jax's default device: "cpu", "gpu" or "tpu"."""
    traced = _traced.get()
    if traced is not None:
        return traced
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def platforms_at_hand() -> tuple[str, ...]:
    """That which is traced for, or else all for which this process may lower a computation."""
    if _traced.get() is not None:
        return (default_platform(),)
    return tuple(sorted({client.platform for client in backends().values()} | {default_platform()}))


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced inside is lowered for one platform only."""
    token = _traced.set(platform)
    try:
        yield
    finally:
        _traced.reset(token)


def local_devices(platform: str) -> list[Any]:
    """The devices of a platform that are this process's own; none where there is no such."""
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:
        return []


def platform_dependent(branches: Mapping[str, Callable[..., Any]], *operands: Any) -> Any:
    """What the branch of the platform that a computation is lowered for makes of the operands.

    Each is traced for its platform; the last is for those that are not named, too.
    """

    def traced(platform: str, branch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*operands: Any) -> Any:
            with traced_for(platform):
                return branch(*operands)

        return run

    runs = {platform: traced(platform, branch) for platform, branch in branches.items()}
    *named, last = runs
    return jax.lax.platform_dependent(
        *operands,
        default=runs[last],
        **{name: runs[each] for each in named for name in _LOWERED.get(each, (each,))},
    )
