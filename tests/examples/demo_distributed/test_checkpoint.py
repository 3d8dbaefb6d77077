"""Checkpoints of several processes: bit for bit what was written, whole or not there, damage found."""

import os
import pathlib

import numpy as np
import pytest

from examples.demo_distributed import checkpoint


def test_a_tree_comes_back_bit_for_bit(tmp_path, tree):
    checkpoint.save(tmp_path / "a" / "x.npz", tree)
    found = checkpoint.load(tmp_path / "a" / "x.npz", tree)
    assert found.keys() == tree.keys()
    for name, value in tree.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.npz"]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    checkpoint.save(path, {"a": np.zeros(3)})
    before = path.read_bytes()

    def fail(number):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"a": np.ones(3)})
    assert path.read_bytes() == before


def test_a_file_is_replaced_and_not_written_over(tmp_path):
    path = tmp_path / "x.npz"
    checkpoint.save(path, {"a": np.zeros(3)})
    before = path.read_bytes()
    # Whoever has the old file open, as a crash would leave the disk, has all of it still.
    with path.open("rb") as file:
        checkpoint.save(path, {"a": np.ones(30)})
        assert file.read() == before
    np.testing.assert_array_equal(checkpoint.load(path, {"a": np.ones(30)})["a"], 1)


@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "a bit", "no archive"])
def test_a_damaged_file_is_an_error_and_its_round_is_passed_over(damage, tmp_path, tree, write_round):
    write_round(tmp_path, 1)
    write_round(tmp_path, 2)
    path = checkpoint.folder_of(tmp_path, 2) / checkpoint.file_of(1)
    text = path.read_bytes()
    at = text.index(tree["codes"].tobytes())
    damaged = {
        "empty": b"",
        "half": text[: len(text) // 2],
        "last byte": text[:-1],
        "a bit": text[:at] + bytes([text[at] ^ 4]) + text[at + 1 :],
        "no archive": b"nonsense",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(checkpoint.CheckpointError, match=r"worker-1.npz is damaged"):
        checkpoint.load(path, tree)
    round_, problems = checkpoint.latest(tmp_path, 2)
    assert round_ == 1
    assert len(problems) == 1
    assert "round-000002/worker-1.npz is damaged" in problems[0]


def test_every_flipped_byte_of_a_file_is_found(tmp_path, tree):
    path = tmp_path / "x.npz"
    checkpoint.save(path, tree)
    text = path.read_bytes()
    with np.load(path) as arrays:  # still an archive that others read
        np.testing.assert_array_equal(arrays["['codes']"], tree["codes"])
    for at in range(len(text)):
        for damaged in (text[at] ^ 1, text[at] ^ 0x80, 255 - text[at]):
            path.write_bytes(text[:at] + bytes([damaged]) + text[at + 1 :])
            with pytest.raises(checkpoint.CheckpointError, match=r"x\.npz is damaged"):
                checkpoint.load(path, tree)
    for wrong in (text + b"\0", b"\0" + text, text[1:], text[:-1], text * 2, text[:16], text[:15], b""):
        path.write_bytes(wrong)
        with pytest.raises(checkpoint.CheckpointError, match=r"x\.npz is damaged"):
            checkpoint.load(path, tree)


def test_a_file_and_its_names_are_on_disk_before_save_returns(tmp_path, monkeypatch, tree):
    done = []
    fsync, replace = os.fsync, pathlib.Path.replace

    def recorded(handle):
        done.append(pathlib.Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path))
        fsync(handle)

    def renamed(path, other):
        done.append("renamed")
        return replace(path, other)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(pathlib.Path, "replace", renamed)
    checkpoint.save(tmp_path / "run" / "round-000001" / "x.npz", tree)
    here = pathlib.Path("run/round-000001")
    assert done == [pathlib.Path("."), pathlib.Path("run"), here / "x.draft", "renamed", here]


def test_what_lies_beside_the_rounds_is_left_alone(tmp_path, write_round):
    write_round(tmp_path, 1)
    write_round(tmp_path, 1_000_000)
    others = ["round-old", "round-000002-copy", "round-2", "round-", "rounds", "round-00000²", "round--00001"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "round-000003").write_text("a file")
    assert checkpoint.latest(tmp_path, 2) == (1_000_000, [])
    checkpoint.keep_only(tmp_path, 5, 5)
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted([*others, "round-000003"])
    assert checkpoint.latest(tmp_path, 2) == (None, [])


def test_the_latest_complete_round_is_found(tmp_path, write_round):
    assert checkpoint.latest(tmp_path / "nothing yet", 2) == (None, [])
    for round_ in (9, 10, 11):
        write_round(tmp_path, round_)
    assert checkpoint.latest(tmp_path, 2) == (11, [])
    (checkpoint.folder_of(tmp_path, 11) / checkpoint.COMMON).unlink()
    assert checkpoint.latest(tmp_path, 2)[0] == 10
    with pytest.raises(checkpoint.CheckpointError, match=r"no round is complete: .*worker-2.npz is missing"):
        checkpoint.latest(tmp_path, 3)


def test_rounds_out_of_date_and_undone_are_removed(tmp_path, write_round):
    for round_ in range(1, 8):
        write_round(tmp_path, round_)
    checkpoint.keep_only(tmp_path, 3, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-00000{i}" for i in (3, 4, 5)]


def test_a_checkpoint_of_something_else_is_an_error(tmp_path, tree):
    path = tmp_path / "x.npz"
    checkpoint.save(path, tree)
    with pytest.raises(checkpoint.CheckpointError, match=r"another tree.*\['odd'\]"):
        checkpoint.load(path, {k: v for k, v in tree.items() if k != "odd"})
    with pytest.raises(checkpoint.CheckpointError, match=r"must hold .*\(4, 3\).* at \['codes'\], got .*\(3, 4\)"):
        checkpoint.load(path, {**tree, "codes": tree["codes"].reshape(4, 3)})
    with pytest.raises(checkpoint.CheckpointError, match=r"float32.* at \['count'\], got .*int32"):
        checkpoint.load(path, {**tree, "count": np.asarray(7, np.float32)})


def test_differences_are_those_of_bits(tmp_path, tree):
    for name in ("one", "other"):
        checkpoint.save(tmp_path / name / "x.npz", tree)
    assert checkpoint.differences(tmp_path / "one", tmp_path / "other") == []
    checkpoint.save(tmp_path / "other" / "x.npz", {**tree, "odd": abs(tree["odd"])})
    assert checkpoint.differences(tmp_path / "one", tmp_path / "other") == ["x.npz: ['odd']"]
    checkpoint.save(tmp_path / "other" / "y.npz", tree)
    with pytest.raises(checkpoint.CheckpointError, match="must hold the same files"):
        checkpoint.differences(tmp_path / "one", tmp_path / "other")
