"""Predicates over parameter paths: which parameters train, which stay frozen.

A path is written with dots, list indices included, exactly as in the PyTorch state dict:
`encoder.layers.3.self_attn.q_proj.kernel`. A pattern is one of

* a glob string: `*` matches any characters, dots included, `?` one character, `[0-3]` one of
  a set. A glob that matches a parent selects everything below it: `encoder.layers.0`;
* a compiled regular expression, which must match the whole path: `re.compile(r".*\\.bias")`.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

Pattern = str | re.Pattern[str]
Patterns = Pattern | Iterable[Pattern]
PathFilter = Callable[[tuple[Any, ...], Any], bool]


def dotted(path: Iterable[Any]) -> str:
    """Write a path (NNX path or JAX key path) with dots: `('layers', 0, 'kernel')`."""
    return ".".join(_component(entry) for entry in path)


def leaf_paths(tree: Any) -> list[str]:
    """Dotted paths of all leaves of a model, an `nnx.State` or a nested dict of arrays."""
    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def matches(pattern: Pattern, path: str) -> bool:
    """True if `pattern` (see the module's description) selects the dotted `path`."""
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    parts = path.split(".")
    parents = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return any(fnmatch.fnmatchcase(parent, pattern) for parent in parents)


def path_filter(
    include: Patterns = "*", exclude: Patterns = (), *, among: Any = None
) -> PathFilter:
    """Build a predicate `(path, value) -> bool` for `nnx.split`, `nnx.state` and friends.

    Args:
      include: patterns, one of which must match.
      exclude: patterns, none of which may match; they win over `include`.
      among: a model, an `nnx.State` or a nested dict; when given, every pattern must match at
        least one of its paths.

    Raises:
      ValueError: a pattern matches nothing in `among`, or nothing remains selected.
    """
    included, excluded = _as_tuple(include), _as_tuple(exclude)

    def selected(path: str) -> bool:
        return any(matches(pattern, path) for pattern in included) and not any(
            matches(pattern, path) for pattern in excluded
        )

    if among is not None:
        paths = leaf_paths(among)
        check_patterns((*included, *excluded), paths)
        if not any(selected(path) for path in paths):
            raise ValueError(
                f"no parameter is selected by include={_show(included)}, "
                f"exclude={_show(excluded)}: `exclude` removes all {len(paths)} paths that "
                "`include` could select."
            )
    return lambda path, value: selected(dotted(path))


def split_trainable(
    model: nnx.Module, include: Patterns = "*", exclude: Patterns = ()
) -> tuple[nnx.GraphDef[Any], dict[Any, Any], dict[Any, Any]]:
    """Split `model` into `(graphdef, train, frozen)`, the latter two plain nested dicts.

    `train` holds the `nnx.Param` leaves that the patterns select, `frozen` everything else;
    `nnx.merge(graphdef, train, frozen)` rebuilds the model.

    Raises:
      ValueError: a pattern matches no parameter, or none is selected.
    """
    chosen = path_filter(include, exclude, among=nnx.state(model, nnx.Param))
    graphdef, train, frozen = nnx.split(model, nnx.All(nnx.Param, chosen), ...)
    return graphdef, nnx.to_pure_dict(train), nnx.to_pure_dict(frozen)


def check_patterns(patterns: Iterable[Pattern], paths: list[str]) -> None:
    """Raise `ValueError`, with the nearest paths, for patterns that match none of `paths`."""
    for pattern in patterns:
        if any(matches(pattern, path) for path in paths):
            continue
        text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        near = difflib.get_close_matches(text, paths, n=5, cutoff=0.3) or paths[:5]
        raise ValueError(
            f"pattern {text!r} matches none of the {len(paths)} parameter paths. "
            f"Near paths: {', '.join(near) or 'none'}."
        )


def _component(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):  # DictKey, SequenceKey, GetAttrKey
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _as_tuple(patterns: Patterns) -> tuple[Pattern, ...]:
    return (patterns,) if isinstance(patterns, str | re.Pattern) else tuple(patterns)


def _show(patterns: tuple[Pattern, ...]) -> list[str]:
    return [p.pattern if isinstance(p, re.Pattern) else p for p in patterns]
