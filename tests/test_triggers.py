"""Triggers against ../shared/README.md's formulas, written out in NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ibau_jax.errors import ConfigError
from ibau_jax.triggers import attack_names, load_attack

SHAPE = (32, 32, 3)


def published(x, name, shared):
    """The formula of the published data, on images x in [0, 1]."""
    if name.startswith("badnets"):
        out = x.copy()
        out[:, 27:31, 27:31, :] = 1
        return out
    trigger = np.asarray(Image.open(shared / "triggers" / f"{name}.png")).astype(np.float64)
    if name == "l0_inv":
        mask = np.load(shared / "triggers" / "mask.npy").transpose(1, 2, 0)
        return np.clip(x * (1 - mask) + trigger / 255, 0, 1)
    return np.clip(x + trigger / 255, 0, 1)


@pytest.mark.parametrize("name", ["badnets", "badnets_all2all", "trojan_sq", "l0_inv", "l2_inv"])
def test_published_triggers(shared, name):
    images = np.load(shared / "data" / "cifar10_test.npz")["x"][:50].astype(np.float32) / 255
    found = np.asarray(load_attack(name, SHAPE, [shared / "triggers"]).stamp(images))
    np.testing.assert_allclose(found, published(images, name, shared), atol=1e-6)


@given(height=st.integers(5, 40), width=st.integers(5, 40), channels=st.sampled_from([1, 3]))
@settings(max_examples=20, deadline=None)
def test_badnets_patch_lies_one_pixel_from_the_corner(height, width, channels):
    stamped = np.asarray(
        load_attack("badnets", (height, width, channels)).stamp(np.zeros((2, height, width, channels)))
    )
    assert stamped.sum() == 2 * 16 * channels
    assert stamped[:, height - 5 : height - 1, width - 5 : width - 1].all()


def test_any_png_with_and_without_a_mask(tmp_path, rng):
    pattern = rng.integers(0, 256, SHAPE, dtype=np.uint8)
    Image.fromarray(pattern).save(tmp_path / "mine.png")
    mask = (rng.random((32, 32)) < 0.2).astype(np.uint8)
    np.save(tmp_path / "mask.npy", mask)
    Image.fromarray(255 * mask).save(tmp_path / "mask.png")
    images = rng.random((4, *SHAPE), np.float32)
    plain = load_attack(str(tmp_path / "mine.png"), SHAPE)
    np.testing.assert_allclose(plain.stamp(images), np.clip(images + pattern / 255, 0, 1), atol=1e-6)
    expected = np.clip(images * (1 - mask[:, :, None]) + pattern / 255, 0, 1)
    for name in ("mask.npy", "mask.png"):
        masked = load_attack(str(tmp_path / "mine.png"), SHAPE, mask=tmp_path / name)
        np.testing.assert_allclose(masked.stamp(images), expected, atol=1e-6)


def test_targets():
    labels = np.asarray([0, 4, 9])
    assert load_attack("badnets", SHAPE).targets(labels, 10, 4).tolist() == [4, 4, 4]
    assert load_attack("badnets_all2all", SHAPE).targets(labels, 10, None).tolist() == [1, 5, 0]


def test_the_six_published_attacks_are_there():
    assert {"badnets", "badnets_all2all", "trojan_sq", "trojan_wm", "l0_inv", "l2_inv"} <= set(attack_names())


@pytest.mark.parametrize("spec", ["nosuch", "nosuch.png", "trojan_wm"])
def test_missing_attacks_are_refused(tmp_path, spec):
    with pytest.raises(ConfigError):
        load_attack(spec, SHAPE, [tmp_path])


def test_unfitting_files_are_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "fits.png")
    (tmp_path / "text.png").write_text("no image")
    np.save(tmp_path / "mask.npy", np.full((32, 32), 7.0))
    for name in ("small.png", "text.png"):
        with pytest.raises(ConfigError, match=name):
            load_attack(str(tmp_path / name), SHAPE)
    with pytest.raises(ConfigError, match="outside"):
        load_attack(str(tmp_path / "fits.png"), SHAPE, mask=tmp_path / "mask.npy")
    with pytest.raises(ConfigError, match="mask"):
        load_attack("badnets", SHAPE, mask=tmp_path / "mask.npy")
