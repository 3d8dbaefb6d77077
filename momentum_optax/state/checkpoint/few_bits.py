"""Velocities in int8 and int4 as format 1 kept them, brought into format 2."""

import functools
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..._typing import Leaf
from ...storage._int4 import Int4, Int4Velocity
from ...storage._int8 import Int8, Int8Velocity
from ...storage.compressed import S
from ...storage.noise import mix, stamp_of
from ...storage.one_pass import InOnePass
from ...storage.protocol import EncodeContext
from ...storage.rows import position, row_axes

# Of format 1 in int8: codes up to `_BODY` are square roots; beyond are the squares of 1 + (4^t - 1) `_NEAR`; without a
# scale, where `body` is 0, the powers of 4.
_BODY, _NEAR = 118, 2.0**-6


_POWERS = 4.0 ** (_BODY - 64) / _NEAR


# And in int4: up to `_ROOTS` they are square roots, and the next one stands for `_BEYOND` scales.
_ROOTS, _BEYOND = 6, 4.0


# The parts of a velocity; in int8 there is "body" as well.
_PARTS = ("codes", "gain", "scale", "reach", "margin", "stamp")


def upgraded(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The leaves of a state by path, with velocities in int8 and int4 in the present form, rounded once more.

    They get noise of their own, that of seed 0; the next scale of a row is that of its largest velocity.
    """
    new = dict(leaves)
    for number, (before, after) in enumerate(_places(leaves)):
        order = sum(f"{before}codes/{k}{after}" in leaves for k in range(len(leaves)))
        old = {
            name: [new.pop(f"{before}{name}/{k}{after}") for k in range(order if name in ("codes", "gain") else 1)]
            for name in (*_PARTS, *(["body"] if f"{before}body/0{after}" in leaves else []))
        }
        for name, part in _parts(old, number)._asdict().items():
            new |= {f"{before}{name}/{k}{after}": x for k, x in enumerate(part)}
    return new


def _places(leaves: Mapping[str, Leaf]) -> Iterator[tuple[str, str]]:
    """What comes before and after the name of a part in the paths of each leaf that format 1 kept in int8 or int4.

    "margin" may also be the name of a parameter, before or after that of the part.
    """
    for path in leaves:
        for found in re.finditer(r"(?<![^/])margin/0(?![^/])", path):
            before, after = path[: found.start()], path[found.end() :]
            if all(f"{before}{name}/0{after}" in leaves for name in _PARTS):
                yield before, after


def _parts(old: dict[str, list[Leaf]], number: int) -> Int8Velocity | Int4Velocity:
    """The parts of one leaf."""
    codes, gains = old["codes"], tuple(jnp.asarray(gain) for gain in old["gain"])
    (one,) = old["margin"]
    if codes[0].dtype not in (jnp.int8, jnp.int4):
        # Kept in full, in a velocity or elsewhere in a field: the other parts stand for nothing.
        kinds = [bool] * 3 if one.dtype == bool else [np.float32, np.float32, np.uint32]
        counts = (len(codes), 1, 1)
        small = [tuple(jnp.zeros(one.shape, kind) for _ in range(n)) for kind, n in zip(kinds, counts, strict=True)]
        return Int8Velocity(tuple(map(jnp.asarray, codes)), *small)
    scale, stamp = (jnp.asarray(old[name][0]) for name in ("scale", "stamp"))
    values = functools.partial(_of_bytes, jnp.asarray(old["body"][0])) if "body" in old else _of_four_bits
    velocities = tuple(
        scale * gain * values(jnp.asarray(c).astype(jnp.float32), _noise(c.shape, stamp, k))
        for k, (c, gain) in enumerate(zip(codes, gains, strict=True))
    )
    if "body" in old:
        return _written(Int8(min_size=1), velocities, gains, number)
    return _written(Int4(min_size=1), velocities, gains, number)


def _written(storage: InOnePass[S], velocities: tuple[jax.Array, ...], gains: tuple[jax.Array, ...], number: int) -> S:
    """The parts of a leaf with these velocities."""
    fresh = storage.numbered(storage.init(velocities[0], len(velocities)), velocities[0], number)
    fresh = storage.fitted(fresh, velocities, gains)
    nothing = (jnp.zeros_like(velocities[0]), 0.0, True)
    return storage.encode(velocities, fresh, EncodeContext(None, gains, nothing))


def _noise(shape: tuple[int, ...], stamp: jax.Array, k: int) -> jax.Array:
    """What format 1 rounded the velocity `k` with, uniform in [-1/2, 1/2)."""
    inner = row_axes(shape)
    outer = tuple(d for d in range(len(shape)) if d not in inner)
    row = mix(position(shape, outer) * np.uint32(0x85EBCA77) + np.uint32(0x2545F491))
    column = position(shape, inner) * np.uint32(0x9E3779B1) + np.uint32(0x3C6EF372)
    bits = (mix(row ^ stamp_of(stamp, k)) | np.uint32(1)) * (column ^ (column >> 15))
    return jax.lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32) * np.float32(2.0**-32)


def _of_bytes(body: jax.Array, code: jax.Array, noise: jax.Array) -> jax.Array:
    """In scales."""
    size = jnp.abs(code)
    power = jax.lax.bitcast_convert_type((size.astype(jnp.int32) << 24) - np.int32(1 << 23), jnp.float32)
    root = power * np.float32(_BODY / _POWERS) + np.float32(_BODY * (1 - _NEAR))
    tail = jnp.where(body > 0, root * root, power)
    value = jnp.where(size <= body, size * code, jnp.where(code < 0, -tail, tail))
    return np.float32(1 / _BODY**2) * (value + 2 * noise * jnp.minimum(size, body))


def _of_four_bits(code: jax.Array, noise: jax.Array) -> jax.Array:
    """In scales."""
    size = jnp.abs(code)
    root = size * (code + 2 * noise) * np.float32(1 / _ROOTS**2)
    return jnp.where(size > _ROOTS, jnp.sign(code) * np.float32(_BEYOND), root)
