"""Regular expressions over the paths of parameters, "layers/0/kernel": the first that matches the whole path counts."""

import re
from collections.abc import Iterable

import jax

from . import _checks
from ._typing import KeyPath


def slash_path(path: KeyPath) -> str:
    """A key path as patterns see it, the keys joined by slashes: "dense/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def compiled(name: str, pattern: object) -> re.Pattern[str]:
    """A key of the mapping `name` as a regular expression.

    Raises:
      TypeError: If it is not a string.
      ValueError: If it is not a regular expression.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must map regular expressions as strings, got {_checks.shown(pattern)}")
    try:
        # A key may hold a line break, and ".*" stands for all other paths.
        return re.compile(pattern, re.DOTALL)
    except re.error as problem:
        raise ValueError(f"{name} must map regular expressions, got {_checks.shown(pattern)}: {problem}") from None


def first_match(name: str, patterns: Iterable[re.Pattern[str]], path: KeyPath) -> int:
    """The index of the first pattern that matches the whole of a path.

    Raises:
      ValueError: If there is none, with the path.
    """
    text, tried = slash_path(path), list(patterns)
    for i, pattern in enumerate(tried):
        if pattern.fullmatch(text):
            return i
    raise ValueError(
        f"{name} must have a pattern that matches the whole of the path {text!r}, got "
        f"{_checks.shown([pattern.pattern for pattern in tried])}: add '.*' as the last pattern, for all other leaves"
    )
