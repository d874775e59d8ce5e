"""Trigger files: what is written comes back, and what is damaged or hostile is refused."""

import io
import zipfile

import numpy as np
import pytest

from ibau_jax.errors import ConfigError
from ibau_jax.triggers import Canvas, load_attack, load_attacks, read_triggers, write_triggers

SHAPE = (16, 16, 3)
SPECS = ("badnets", "badnets:look=noise", "blended", "sig", "smooth", "wanet", "bpp", "bpp:dithering=floyd")


@pytest.mark.parametrize("spec", SPECS)
def test_a_trigger_comes_back(tmp_path, spec):
    written = load_attacks([spec], [3], Canvas(SHAPE))
    write_triggers(written, tmp_path / "triggers.npz")
    found = load_attack(str(tmp_path / "triggers.npz"), SHAPE)
    images = np.random.default_rng(0).random((3, *SHAPE), np.float32)
    np.testing.assert_array_equal(found.stamp(images), written[0].stamp(images))
    assert (found.name, found.target_label, found.all_to_all, found.further) == (spec, 3, False, ())


def test_several_and_all_to_all_come_back(tmp_path):
    write_triggers(load_attacks(["badnets", "sig"], [3, 1], Canvas(SHAPE)), tmp_path / "two.npz")
    found = read_triggers(tmp_path / "two.npz", SHAPE)
    assert [part.target_label for part in found.parts(10)] == [3, 1]
    assert [part.name for part in found.parts(10)] == ["badnets", "sig"]
    write_triggers(load_attacks(["badnets_all2all"], [], Canvas(SHAPE)), tmp_path / "all.npz")
    assert read_triggers(tmp_path / "all.npz", SHAPE).all_to_all


def npz(path, **arrays):
    np.savez(path, **{name.replace("_", "."): value for name, value in arrays.items()})


def test_a_file_from_before_a_field_was_added(tmp_path):
    npz(tmp_path / "old.npz", **{"0_kind": "quantised", "0_name": "bpp", "0_target": 3, "0_levels": 8})
    assert read_triggers(tmp_path / "old.npz", SHAPE).stamp.dithered is False


GOOD = {"0_kind": "additive", "0_name": "mine", "0_target": 3, "0_pattern": np.zeros(SHAPE, np.float32)}


@pytest.mark.parametrize(
    "change",
    [
        {"0_kind": "os.system"},
        {"0_pattern": np.zeros((8, 8, 3), np.float32)},
        {"0_pattern": np.zeros((16, 16), np.float32)},
        {"0_pattern": np.full(SHAPE, np.nan, np.float32)},
        {"0_pattern": np.zeros(SHAPE, object)},
        {"0_target": "three"},
        {"0_target": np.inf},
        {"0_target": [3]},
        {"0_name": 3},
        {"0_name": ["a", "b"]},
        {"0_kind": "warp"},
        {"0_kind": 3},
        {"0_kind": "patch", "0_rows": [np.inf, 3.0], "0_columns": [0, 3]},
        {"0_kind": "patch", "0_rows": [0, 99], "0_columns": [0, 3]},
        {"0_kind": "patch", "0_rows": [-3, 3], "0_columns": [0, 3]},
        {"0_kind": "patch", "0_rows": [3, 3], "0_columns": [0, 3]},
        {"0_kind": "patch", "0_rows": [0, 3, 1], "0_columns": [0, 3]},
        {"0_kind": "patch", "0_rows": [0, 3], "0_columns": [0, 3], "0_value": np.nan},
        {"0_kind": "patch", "0_rows": [0, 3], "0_columns": [0, 3], "0_value": 7.0},
        {"0_kind": "quantised", "0_levels": 0},
        {"0_kind": "quantised", "0_levels": 1},
        {"0_kind": "quantised", "0_levels": 8.5},
        {"0_kind": "quantised", "0_levels": 8, "0_dithered": 3.0},
        {"0_kind": "masked", "0_mask": np.full((16, 16, 1), 2, np.float32)},
        {"0_kind": "masked", "0_mask": np.full((16, 16, 1), -1, np.float32)},
        {"0_kind": "masked", "0_mask": np.zeros((16, 16, 2), np.float32)},
        {"0_kind": "warp", "0_grid": np.zeros((16, 16, 3), np.float32)},
        {"0_kind": "inputaware", "0_pattern.down.0.0.kernel": np.zeros((3, 3, 3, 8), np.float32)},
        {"7_kind": "additive"},
    ],
)
def test_what_is_no_trigger_is_refused(tmp_path, change):
    npz(tmp_path / "good.npz", **GOOD)
    assert read_triggers(tmp_path / "good.npz", SHAPE).target_label == 3
    npz(tmp_path / "bad.npz", **GOOD | change)
    with pytest.raises(ConfigError, match="bad.npz") as caught:
        read_triggers(tmp_path / "bad.npz", SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("left_out", "added", "message"),
    [
        ("0_kind", {}, "has no 0.kind, and such a file is written by scripts/poison.py"),
        ("0_target", {}, "has no 0.target"),
        ("0_pattern", {}, "has no 0.pattern"),
        ("0_kind", {"0_kind": "magic"}, "unknown kind 'magic'; known are patch, additive"),
    ],
)
def test_what_is_missing_is_named(tmp_path, left_out, added, message):
    npz(tmp_path / "bad.npz", **{name: value for name, value in GOOD.items() if name != left_out} | added)
    with pytest.raises(ConfigError, match=message):
        read_triggers(tmp_path / "bad.npz", SHAPE)


def test_a_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0.pattern.npy", bytes(2**27))
    with pytest.raises(ConfigError, match="more than any trigger takes"):
        read_triggers(tmp_path / "bomb.npz", SHAPE)


def test_a_header_that_promises_too_much_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**45,)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as file:
        file.writestr("0.pattern.npy", header.getvalue())
    with pytest.raises(ConfigError, match="no file of triggers"):
        read_triggers(tmp_path / "bomb.npz", SHAPE)


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_what_is_no_archive_is_refused(tmp_path, content):
    if content is None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("hello.txt", "world")
        content = archive.getvalue()
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ConfigError, match="no file of triggers"):
        read_triggers(tmp_path / "bad.npz", SHAPE)


@pytest.mark.parametrize(
    ("specs", "targets", "message"),
    [
        (["badnets"], [], "attacks: 1, target labels: 0"),
        (["badnets", "sig"], [1], "attacks: 2, target labels: 1"),
        (["badnets", "badnets_all2all"], [1, 2], "name it alone"),
    ],
)
def test_attacks_need_their_targets(specs, targets, message):
    with pytest.raises(ConfigError, match=message):
        load_attacks(specs, targets, Canvas(SHAPE))
