"""Models larger than memory: their blocks' parameters are brought when the blocks run.

They rest in the mapped file, or on a host with an accelerator in pinned memory. While one block
computes, a thread brings those of the next, so two blocks are on the device at a time.
"""

import dataclasses
import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import ConceptaxError

Model = TypeVar("Model", bound=nnx.Module)


class StreamError(ConceptaxError, ValueError):
    """A streamed model that is not used as such, or that brings numbers which are none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """A parameter that is made each time it is brought, of what is quantized in its file.

    Attributes:
      shape: of it.
      dtype: of it.
      read: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Stream:
    """Blocks in the order in which they run, whose parameters come as they are needed.

    Args:
      blocks: modules with parameters on the host: NumPy arrays, also of a mapped file, and what is
        `Deferred`.
    """

    def __init__(self, blocks: Sequence[nnx.Module]):
        self._split = [_split(block) for block in blocks]
        self._graphs: dict[tuple[int, Any], Any] = {}
        self._unchecked = set(range(len(blocks)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="conceptax-stream")
        self._coming: tuple[int, Future] | None = None

    def attention_of(self, index: int) -> Any:
        """What a block's attention sees, as it was made; None of a dense one."""
        return next(iter(_attending(self._whole(index))), _Dense).neighborhood

    def run(self, index: int, neighborhood: Any, *args: Any, **kwargs: Any) -> Any:
        """Block `index` of these arguments, with that attention; returns when it has computed.

        Raises:
          StreamError: inside a transformation of jax, or a parameter is NaN or infinite.
        """
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            raise StreamError(
                "a streamed model is called as it is, not inside jax.jit or jax.grad: its blocks "
                "are compiled one by one. Load it without stream=True to trace it."
            )
        _, tree, turned, _ = self._split[index]
        graphdef = self._graph(index, neighborhood)
        if self._coming is None or self._coming[0] != index:
            self._coming = index, self._thread.submit(self._bring, index)
        leaves = self._coming[1].result()
        after = (index + 1) % len(self._split)
        self._coming = after, self._thread.submit(self._bring, after)
        if index in self._unchecked:
            self._check(index, leaves)
        return jax.block_until_ready(_run(graphdef, tree, turned, leaves, args, kwargs))

    def _whole(self, index: int) -> Any:
        graphdef, tree, _, leaves = self._split[index]
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))

    def _graph(self, index: int, neighborhood: Any) -> Any:
        """The graph definition of a block with another attention."""
        if (index, neighborhood) not in self._graphs:
            block = self._whole(index)
            for node in _attending(block):
                node.neighborhood = neighborhood
            self._graphs[index, neighborhood] = nnx.split(block)[0]
        return self._graphs[index, neighborhood]

    def _bring(self, index: int) -> list[jax.Array]:
        leaves = []
        for leaf in self._split[index][3]:
            if isinstance(leaf, jax.Array):  # in pinned memory
                device = next(iter(leaf.devices()))
                there = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
                leaves.append(jax.device_put(leaf, there))
            else:
                leaves.append(jax.device_put(_own(leaf)))
        return jax.block_until_ready(leaves)

    def _check(self, index: int, leaves: list[jax.Array]) -> None:
        _, tree, turned, _ = self._split[index]
        paths = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(tree, turned))[0]
        names = [f"{'.'.join(str(key.key) for key in path)} of block {index}" for path, _ in paths]
        _require_finite(_finite(leaves), names)
        self._unchecked.discard(index)


class StreamedBlock(nnx.Module):
    """One block of a `Stream`, in its place in a model."""

    def __init__(self, stream: Stream, index: int):
        self.stream = stream
        self.index = index
        self.neighborhood = stream.attention_of(index)  # `with_attention` sets it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stream.run(self.index, self.neighborhood, *args, **kwargs)


def stream(model: Model, *, pinned: bool | None = None) -> Model:
    """A copy of a model whose blocks, `model.BLOCKS`, are streamed; its other parameters stay.

    It is called as it is, not inside `jax.jit`.

    Args:
      model: with parameters on the host, as `load_pytorch(..., sharding="mapped")` gives it.
      pinned: whether blocks rest in pinned memory of the host, which is read once, and not in
        their file; by default on accelerators.

    Raises:
      StreamError: a model without blocks to stream.
    """
    names = getattr(model, "BLOCKS", ())
    if not names:
        raise StreamError(f"a {type(model).__name__} has no blocks to stream: load it whole.")
    pinned = jax.default_backend() != "cpu" if pinned is None else pinned
    copy = nnx.merge(*nnx.split(model))
    lists = [_attribute(copy, name) for name in names]
    blocks = [block for each in lists for block in each]
    streamed = Stream([_in_pinned_memory(block) if pinned else block for block in blocks])
    start = 0
    for name, each in zip(names, lists, strict=True):
        *parents, last = name.split(".")
        indices = range(start, start + len(each))
        place = _attribute(copy, ".".join(parents))
        setattr(place, last, nnx.List([StreamedBlock(streamed, index) for index in indices]))
        start += len(each)
    for path, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Variable) and isinstance(
            value := node.get_value(), np.ndarray | Deferred
        ):
            own = jax.device_put(_own(value))
            _require_finite(_finite([own]), [".".join(map(str, path))])
            node.set_value(own)
    return copy


def is_streamed(model: Any) -> bool:
    """Whether a model has streamed blocks."""
    return isinstance(model, nnx.Module) and any(
        isinstance(node, StreamedBlock) for _, node in nnx.iter_graph(model)
    )


class _Dense:
    neighborhood = None


def _attending(block: nnx.Module) -> list[Any]:
    return [node for _, node in nnx.iter_graph(block) if hasattr(node, "neighborhood")]


def _attribute(model: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        model = getattr(model, name)
    return model


def _split(block: nnx.Module) -> tuple[Any, Any, tuple[bool, ...], list[Any]]:
    """Graph definition, structure, which leaves are turned to be contiguous, and the leaves."""
    graphdef, state = nnx.split(block)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    turned = tuple(isinstance(leaf, np.ndarray) and _is_turned(leaf) for leaf in leaves)
    return graphdef, tree, turned, [x.T if t else x for x, t in zip(leaves, turned, strict=True)]


def _is_turned(view: np.ndarray) -> bool:
    return view.flags.f_contiguous and not view.flags.c_contiguous


def _in_pinned_memory(block: nnx.Module) -> nnx.Module:
    copy = nnx.merge(*nnx.split(block))
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    for _, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Variable):
            value = node.get_value()
            values = value.read() if isinstance(value, Deferred) else value
            node.set_value(jax.device_put(values, there))
            release(value)
    return copy


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(graphdef: Any, tree: Any, turned: tuple[bool, ...], leaves: Any, args: Any, kwargs: Any):
    """A block as it is in its file: matrices are turned in their products."""
    leaves = [x.T if t else x for x, t in zip(leaves, turned, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(*args, **kwargs)


def _require_finite(finite: jax.Array, names: Sequence[str]) -> None:
    if broken := [name for name, fine in zip(names, np.asarray(finite), strict=True) if not fine]:
        raise StreamError(
            f"{', '.join(broken)} holds NaN or infinite values: the checkpoint is damaged or its "
            "training diverged; use another one."
        )


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


# ---- memory of the host ----

_LARGE = 1 << 22  # bytes from which NumPy asks for huge pages


def _own(leaf: np.ndarray | Deferred) -> np.ndarray:
    """The values of a parameter in memory of their own; those of a file are given back."""
    if isinstance(leaf, Deferred):
        return aligned_copy(leaf.read())
    values = aligned_copy(leaf)
    release(leaf)
    return values


def aligned_copy(view: np.ndarray) -> np.ndarray:
    """A C-contiguous copy that JAX adopts instead of copying it once more."""
    own = aligned_empty(view.shape, view.dtype)
    own[...] = view
    return own


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory for a C-contiguous array that JAX adopts.

    Large ones do not ask for huge pages, as NumPy's do: a system whose memory is in use takes
    several times as long to put together one of those as to give the small ones in its place.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        spare = np.empty(size + 64, np.uint8)
        start = -spare.ctypes.data % 64
        return spare[start : start + size].view(dtype).reshape(shape)
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    return np.frombuffer(mmap.mmap(-1, size, **private), np.uint8).view(dtype).reshape(shape)


def mapping(view: Any) -> tuple[Any, int]:
    """The mapped file that a view is of, if it is of one, and its first byte there."""
    root = view
    while isinstance(root, np.ndarray) and root.base is not None:
        root = root.base
    root = root.obj if isinstance(root, memoryview) else root
    if not isinstance(root, mmap.mmap):
        return None, 0
    first = np.frombuffer(root, np.uint8).ctypes.data
    return root, view.__array_interface__["data"][0] - first


def release(view: Any) -> None:
    """Give back the memory of those pages of a mapped file that lie within a view of it."""
    root, begin = mapping(view)
    advise: Callable[..., None] | None = getattr(root, "madvise", None)
    if advise is None:
        return
    page = mmap.PAGESIZE
    start, stop = -(-begin // page) * page, (begin + view.nbytes) // page * page
    if stop > start:
        advise(mmap.MADV_DONTNEED, start, stop - start)
