"""Checkpoints of many processes: a folder for each round, a file for each worker and one for what all share.

A file appears under its name only when all of it is on disk, and so does its name in the folder. A round is complete
when all of its files are there and whole. A file is a ZIP archive as NumPy writes it, whose comment is a digest of all
bytes before it: the archive's own sums (CRC-32 of each member) do not cover its directory.
"""

import hashlib
import io
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

COMMON = "common.npz"
# One may be half written when another is found to be damaged.
KEPT_ROUNDS = 3
_DIGEST_BYTES = 16


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of another run."""


def folder_of(root: Path, round_: int) -> Path:
    """The folder with the files of a round."""
    return root / f"round-{round_:06}"


def file_of(worker: int) -> str:
    """The name of a worker's own file."""
    return f"worker-{worker}.npz"


def save(path: Path, tree: optax.Params) -> None:
    """Write a tree of arrays so that after a crash the file is there as a whole or not at all."""
    _make_folder(path.parent)
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(_archive(_named(tree)))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync_folder(path.parent)


def load(path: Path, like: optax.Params) -> optax.Params:
    """Read a tree of the structure, shapes and dtypes of `like`.

    Raises:
      CheckpointError: If the file is missing or damaged, or holds anything else.
    """
    found, wanted = _arrays(path), _named(like)
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise CheckpointError(f"{path} holds another tree; in one and not in the other: {', '.join(odd)}")
    for name, leaf in wanted.items():
        kind, expected = (found[name].dtype, found[name].shape), (leaf.dtype, leaf.shape)
        if kind != expected:
            raise CheckpointError(f"{path} must hold {expected} at {name}, got {kind}")
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def latest(root: Path, workers: int) -> tuple[int | None, list[str]]:
    """The last complete round, and what is wrong with those after it; None where no round was ever begun.

    Raises:
      CheckpointError: If rounds were begun and none is complete.
    """
    problems = []
    for folder in sorted(_rounds(root), key=_round_of, reverse=True):
        try:
            for name in (COMMON, *map(file_of, range(workers))):
                _arrays(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return _round_of(folder), problems
    if problems:
        raise CheckpointError("no round is complete: " + "; ".join(problems))
    return None, []


def keep_only(root: Path, oldest: int, newest: int) -> None:
    """Remove the folders of rounds before `oldest` and after `newest`; what else is there stays."""
    for folder in _rounds(root):
        if not oldest <= _round_of(folder) <= newest:
            shutil.rmtree(folder)


def differences(a: Path, b: Path) -> list[str]:
    """The arrays of two folders of files that are not the same, bit for bit."""
    names = [sorted(path.name for path in folder.glob("*.npz")) for folder in (a, b)]
    if names[0] != names[1] or not names[0]:
        raise CheckpointError(f"{a} and {b} must hold the same files, got {names[0]} and {names[1]}")
    found = []
    for name in names[0]:
        left, right = _arrays(a / name), _arrays(b / name)
        for key in sorted(left.keys() | right.keys()):
            same = key in left and key in right and left[key].dtype == right[key].dtype
            if not same or left[key].shape != right[key].shape or left[key].tobytes() != right[key].tobytes():
                found.append(f"{name}: {key}")
    return found


def _rounds(root: Path) -> Iterator[Path]:
    """The folders that `folder_of` names."""
    return (x for x in root.glob("round-*") if re.fullmatch(r"round-\d{6,}", x.name, re.ASCII) and x.is_dir())


def _round_of(folder: Path) -> int:
    return int(folder.name.removeprefix("round-"))


def _named(tree: optax.Params) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if _digest(text[:-_DIGEST_BYTES]) != text[-_DIGEST_BYTES:]:
        raise CheckpointError(f"{path} is damaged: its digest is that of other bytes")
    with np.load(io.BytesIO(text)) as arrays:
        return dict(arrays)


def _archive(arrays: dict[str, Any]) -> bytes:
    """A ZIP archive of arrays that ends in the digest of what comes before."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = bytes(_DIGEST_BYTES)
    text = file.getvalue()[:-_DIGEST_BYTES]
    return text + _digest(text)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, with their names on disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk: a file that was renamed is else found under its old name after a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
