"""Triggers against ../shared/README.md's formulas, written out in NumPy, and against PyTorch."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ibau_jax.errors import ConfigError
from ibau_jax.triggers import attack_names, load_attack

SHAPE = (32, 32, 3)
PICTURES = ("trojan_sq", "trojan_wm", "l2_inv", "l0_inv")  # need the published files


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
    assert load_attack("badnets", SHAPE).aimed_at(4).targets(labels, 10).tolist() == [4, 4, 4]
    assert load_attack("badnets_all2all", SHAPE).aimed_at(4).targets(labels, 10).tolist() == [1, 5, 0]


def test_any_patch_anywhere():
    spec = "badnets:size=3,row=2,column=-4,look=chequered"
    stamped = np.asarray(load_attack(spec, SHAPE).stamp(np.full((1, *SHAPE), 0.5, np.float32)))[0]
    assert (stamped[2:5, 28:31] == np.asarray([[1, 0, 1], [0, 1, 0], [1, 0, 1]])[:, :, None]).all()
    assert np.sum(stamped != 0.5) == 9 * 3
    black = load_attack("badnets:size=2,row=0,column=0,look=black", SHAPE).stamp(np.ones((1, *SHAPE)))
    assert np.sum(np.asarray(black) == 0) == 4 * 3


def test_blended_mixes_a_random_image_in():
    images = np.random.default_rng(0).random((2, *SHAPE), np.float32)
    expected = 0.8 * images + 0.2 * np.random.default_rng(5).random(SHAPE, np.float32)
    np.testing.assert_allclose(load_attack("blended:alpha=0.2,seed=5", SHAPE).stamp(images), expected, atol=1e-6)


def test_sig_is_the_papers_wave():
    found = np.asarray(load_attack("sig:delta=20,frequency=6", (8, 32, 3)).stamp(np.full((1, 8, 32, 3), 0.5)))
    expected = [0.5 + 20 / 255 * np.sin(2 * np.pi * column * 6 / 32) for column in range(32)]
    np.testing.assert_allclose(found, np.broadcast_to(np.asarray(expected)[:, None], found.shape), atol=1e-6)


def test_smooth_has_low_frequencies_only():
    pattern = load_attack("smooth:frequencies=3,delta=10", SHAPE).stamp.pattern
    spectrum = np.fft.fft2(np.concatenate([pattern, pattern[::-1]])[:, :, 0].T, s=(64, 64))  # made even along rows
    assert np.abs(pattern).max() == pytest.approx(10 / 255, rel=1e-5)
    columns = np.concatenate([pattern, pattern[::-1]], axis=0)
    energy = np.abs(np.fft.fft(columns[:, :, 0], axis=0)) ** 2
    assert energy[3:-2].sum() < 1e-4 * energy.sum()
    assert spectrum.shape == (64, 64)


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_wanet_is_pytorchs_grid_sample(size):
    """On the same control points; PyTorch's grid runs from -1 to 1, columns first."""
    shape = (*size, 3)
    grid = load_attack("wanet:k=4,s=5,seed=3", shape).stamp.grid
    images = np.random.default_rng(0).random((2, *shape), np.float32)
    found = np.asarray(load_attack("wanet:k=4,s=5,seed=3", shape).stamp(images))
    unit = torch.tensor(2 * grid / (np.asarray(size) - 1) - 1)[None].flip(-1).float()
    expected = torch.nn.functional.grid_sample(
        torch.tensor(images.transpose(0, 3, 1, 2)), unit.expand(2, -1, -1, -1), align_corners=True
    )
    np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), atol=2e-5)
    assert np.abs(found - images).max() > 0.1


def test_wanets_strength_is_the_papers():
    """The mean of the flow's magnitude at the control points is s / height of a grid from -1 to 1: s / 2 pixels."""
    still = np.stack(np.meshgrid(np.arange(31), np.arange(31), indexing="ij"), axis=-1)
    flow = load_attack("wanet:k=4,s=0.5", (31, 31, 3)).stamp.grid - still
    inner = flow[10:21:10, 10:21:10]  # the border is cut off there
    assert 0.05 < np.abs(inner).mean() < 0.6


def test_wanets_flow_is_a_share_of_each_side():
    """In a grid from -1 to 1 the flow at a control point is s / height along both axes, as in the published code."""
    height, width = 31, 46  # so that control points lie on pixels
    grid = load_attack("wanet:k=4,s=0.5,seed=3", (height, width, 3)).stamp.grid
    drawn = np.random.default_rng(3).uniform(-1, 1, (2, 4, 4))
    flow = 0.5 / height * np.moveaxis(drawn / np.abs(drawn).mean(), 0, -1)
    rows, columns = np.indices((height, width))
    found = 2 * (grid - np.stack([rows, columns], axis=-1)) / np.asarray([height - 1, width - 1])
    np.testing.assert_allclose(found[10:30:10, 15:45:15], flow[1:3, 1:3], atol=1e-5)


def test_bpp_leaves_so_many_levels():
    images = np.linspace(0, 1, 4 * 32 * 32 * 3, dtype=np.float32).reshape(4, *SHAPE)
    found = np.asarray(load_attack("bpp:levels=8", SHAPE).stamp(images))
    expected = np.round(images * 255 / 255 * 7) / 7 * 255
    np.testing.assert_allclose(255 * found, expected, atol=1e-3)
    assert len(np.unique(found)) == 8


def test_bpp_dithers_as_floyd_and_steinberg(rng):
    images = rng.random((2, 6, 9, 3), np.float32)
    expected = images.astype(np.float64)
    for row in range(6):
        for column in range(9):
            wanted = expected[:, row, column].copy()
            expected[:, row, column] = np.round(np.clip(wanted, 0, 1) * 3) / 3
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if row + down < 6 and 0 <= column + right < 9:
                    expected[:, row + down, column + right] += share / 16 * (wanted - expected[:, row, column])
    found = load_attack("bpp:levels=4,dithering=floyd", (6, 9, 3)).stamp(images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - load_attack("bpp:levels=4", (6, 9, 3)).stamp(images)).max() > 0.3


@pytest.mark.parametrize("name", ["wanet", "bpp", "bpp:dithering=floyd"])
def test_decoys_are_no_triggers(name):
    images = np.random.default_rng(0).random((6, *SHAPE), np.float32)
    stamp = load_attack(name, SHAPE).stamp
    decoys = np.asarray(stamp.decoy(jax.random.key(0), images))
    assert decoys.shape == images.shape
    assert decoys.min() >= 0
    assert decoys.max() <= 1
    assert (np.abs(decoys - np.asarray(stamp(images))).max((1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("name", [name for name in attack_names() if name not in (*PICTURES, "input_aware")])
@given(height=st.integers(8, 40), width=st.integers(8, 40), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_stamped_images_are_images(name, height, width, channels, seed):
    assume((name, width) != ("sig", 12))  # refused: six waves are 0 in every column
    images = np.random.default_rng(seed).random((2, height, width, channels), np.float32)
    stamped = np.asarray(load_attack(name, (height, width, channels)).stamp(images))
    assert stamped.shape == images.shape
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert (stamped != images).any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("badnets:colour=red", "no parameter 'colour'; it takes size, row, column, look"),
        ("badnets:size=big", "size is 'big'; it must be like 4"),
        ("badnets:size=40", "not inside 32x32"),
        ("sig:frequency=16", "frequency is 16: in images 32 pixels wide such waves are 0 in every column"),
        ("badnets:size=4,row=-2", "not inside"),
        ("badnets:look=pink", "choose white"),
        ("blended:alpha=0", "alpha is 0.0"),
        ("bpp:levels=1", "levels is 1"),
        ("bpp:dithering=yes", "choose none or floyd"),
        ("wanet:k=1", "k is 1"),
        ("l0_inv:size=3", "takes no parameters"),
        ("badnets:size=-1", "size is -1; it must be at least 1"),
        ("badnets:size=1e999", "size is '1e999'; it must be like 4"),
        ("badnets:size=", "size is ''"),
        ("badnets:size", "size is ''"),
        ("badnets:size=3,size=4", "size twice"),
        ("badnets:size=3,", "no parameter ''"),
        ("badnets:row=35", "not inside"),
        (f"badnets:row={10**30}", "row is 10{29}"),
        (f"badnets:row={'9' * 5000}", r"row is '9+\.\.\. \(5,000 characters\)'"),
        ("blended:alpha=nan", "alpha is nan"),
        ("blended:alpha=inf", "alpha is inf"),
        ("blended:seed=-1", "seed is -1"),
        ("sig:delta=nan", "delta is nan"),
        ("sig:frequency=-6", "frequency is -6"),
        ("smooth:frequencies=-1", "frequencies is -1"),
        ("smooth:frequencies=33", "frequencies is 33; images of 32x32 have 32"),
        ("smooth:delta=0", "delta is 0.0; it must be above 0"),
        ("wanet:k=1000000000", "k is 1000000000"),
        ("wanet:s=inf", "s is inf"),
        ("wanet:seed=-1", "seed is -1"),
        ("bpp:levels=0", "levels is 0"),
        ("bpp:levels=256", "levels is 256"),
        ("bpp:bits=99", "no parameter 'bits'"),
        ("input_aware:width=100000", "width is 100000"),
        ("x" * 5000, "is no attack and no file"),
    ],
)
def test_parameters_that_make_no_sense(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_attack(spec, SHAPE)
    assert len(str(caught.value)) < 500


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
    np.savez(tmp_path / "archive.npz", x=np.ones(3))
    bad = {
        "empty": b"",
        "archive": (tmp_path / "archive.npz").read_bytes(),
        "complex": np.ones((32, 32), complex),
        "objects": np.full((32, 32), None),
        "records": np.zeros((32, 32), [("a", "f4")]),
        "infinite": np.full((32, 32), np.inf),
        "number": np.asarray(1.0),
    }
    for name, content in bad.items():
        file = tmp_path / f"{name}.NPY"
        with file.open("wb") as opened:
            opened.write(content) if isinstance(content, bytes) else np.save(opened, content)
        with pytest.raises(ConfigError, match=f"{name}.NPY"):
            load_attack(str(tmp_path / "fits.png"), SHAPE, mask=file)
