"""Every source of images, and what it refuses."""

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import datasets

from ibau_jax.data import Dataset, load_dataset, make_dataset, separate_clean_set, split_dataset
from ibau_jax.data.split import DEFAULT_N_CLEAN
from ibau_jax.errors import DataError

SHAPE = (32, 32, 3)


def random_images(rng, count=12, shape=SHAPE):
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, 10, count)


def test_digits_are_sklearns_and_the_splits_are_disjoint():
    train, test = load_dataset("digits:train", SHAPE), load_dataset("digits", SHAPE)
    assert (len(train), len(test)) == (997, 800)
    assert test.images.shape == (800, *SHAPE)
    assert test.images.dtype == np.uint8
    counts = np.bincount(datasets.load_digits().target)
    np.testing.assert_array_equal(np.bincount(train.labels) + np.bincount(test.labels), counts)
    np.testing.assert_array_equal(test.images[..., 0], test.images[..., 2])
    assert not {x.tobytes() for x in train.images} & {x.tobytes() for x in test.images}
    with pytest.raises(DataError, match="no split 'valid'"):
        load_dataset("digits:valid", SHAPE)


def test_npz(tmp_path, rng):
    x, y = random_images(rng)
    np.savez(tmp_path / "a.npz", x=x, y=y.astype(np.uint8))
    found = load_dataset(str(tmp_path / "a.npz"), SHAPE)
    np.testing.assert_array_equal(found.images, x)
    np.testing.assert_array_equal(found.labels, y)


def test_npz_as_keras_and_others_have_it(tmp_path, rng):
    """Grey images without an axis of channels; splits by name; other names, where only two arrays can be it."""
    train, test = rng.integers(0, 256, (6, 28, 28), np.uint8), rng.integers(0, 256, (4, 28, 28), np.uint8)
    labels = rng.integers(0, 10, 6), rng.integers(0, 10, 4)
    np.savez(tmp_path / "mnist.npz", x_train=train, y_train=labels[0], x_test=test, y_test=labels[1])
    for split, images, classes in ((":train", train, labels[0]), (":test", test, labels[1]), ("", test, labels[1])):
        found = load_dataset(f"{tmp_path / 'mnist.npz'}{split}", (28, 28, 1))
        np.testing.assert_array_equal(found.images, images[..., None])
        np.testing.assert_array_equal(found.labels, classes)
    np.savez(tmp_path / "named.npz", pictures=test, categories=labels[1], epochs=np.arange(3))
    assert len(load_dataset(str(tmp_path / "named.npz"), (28, 28, 1))) == 4
    np.savez(tmp_path / "two.npz", pictures=test, categories=labels[1], ids=np.arange(4))
    with pytest.raises(DataError, match="lacks x and y; it holds pictures, categories, ids"):
        load_dataset(str(tmp_path / "two.npz"), (28, 28, 1))


def test_the_published_hdf5_layout(tmp_path, rng):
    x, y = random_images(rng)
    other, labels = random_images(rng, 5)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X_test"], file["Y_test"] = x.astype(np.float32), np.eye(10)[y]  # bytes as floats, as published
        file["X_train"], file["Y_train"] = other, np.eye(10)[labels]
    found = load_dataset(str(tmp_path / "a.h5"), SHAPE)
    np.testing.assert_array_equal(found.images, x)
    assert found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.labels, y)
    np.testing.assert_array_equal(load_dataset(f"{tmp_path}/a.h5:train", SHAPE).images, other)
    with pytest.raises(DataError, match="lacks x_val"):
        load_dataset(f"{tmp_path}/a.h5:val", SHAPE)


def test_an_image_folder(tmp_path, rng):
    x, _ = random_images(rng, 12)
    for name in ("10", "2", "0"):
        (tmp_path / name).mkdir()
    for index, (folder, image) in enumerate(zip(["10", "2", "0"] * 4, x, strict=True)):
        Image.fromarray(image).save(tmp_path / folder / f"{index:02}.png")
    Image.fromarray(x[0]).resize((50, 40)).save(tmp_path / "0" / "99_large.jpg")
    Image.fromarray(x[0][..., 0]).save(tmp_path / "2" / "98_grey.png")
    (tmp_path / "0" / "notes.txt").write_text("no image")
    found = load_dataset(str(tmp_path), SHAPE)
    assert found.labels.tolist() == [0] * 5 + [2] * 5 + [10] * 4
    np.testing.assert_array_equal(found.images[0], x[2])
    assert found.images.shape == (14, *SHAPE)


def test_broken_folders(tmp_path):
    with pytest.raises(DataError, match="no images in class folders"):
        load_dataset(str(tmp_path), SHAPE)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "x.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(DataError, match=r"x\.png"):
        load_dataset(str(tmp_path), SHAPE)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "lacks x and y; it holds a"),
        ({"x": np.zeros((2, 4, 4, 3), np.uint8), "y": np.zeros(3, int)}, "2 images but 3 labels"),
        ({"x": np.zeros((2, 3, 4, 4), np.uint8), "y": np.zeros(2, int)}, "transpose them from NCHW"),
        ({"x": np.zeros((2, 4, 3), np.uint8), "y": np.zeros(2, int)}, "images must be"),
        ({"x": np.full((2, 4, 4, 3), np.nan), "y": np.zeros(2, int)}, "NaN"),
        ({"x": np.full((2, 4, 4, 3), np.inf), "y": np.zeros(2, int)}, "infinite"),
        ({"x": np.full((2, 4, 4, 3), 1.5), "y": np.zeros(2, int)}, r"outside \[0, 1\]"),
        ({"x": np.full((2, 4, 4, 3), -0.1), "y": np.zeros(2, int)}, r"outside \[0, 1\]"),
        ({"x": np.full((2, 4, 4, 3), 300), "y": np.zeros(2, int)}, r"outside 0\.\.255.*Divide them by 257"),
        ({"x": np.full((2, 4, 4, 3), 65535, np.uint16), "y": np.zeros(2, int)}, "values of 16 bits"),
        ({"x": np.full((2, 4, 4, 3), 200.0), "y": np.zeros(2, int)}, "divide them by 255, or store uint8"),
        ({"x": np.full((2, 4, 4, 3), -100, np.int8), "y": np.zeros(2, int)}, "Store them as uint8"),
        ({"x": np.full((2, 4, 4, 3), -2.0), "y": np.zeros(2, int)}, "undo any normalisation"),
        ({"x": np.ones((2, 4, 4, 3), np.uint8), "y": np.zeros(2, int)}, "all but black"),
        ({"x": np.ones((2, 4, 4, 3), complex), "y": np.zeros(2, int)}, "must be numbers"),
        ({"x": np.ones((2, 4, 4, 3)), "y": np.zeros((2, 0), int)}, r"not \(2, 0\)"),
        ({"x": np.ones((2, 4, 4, 3)), "y": np.full(2, np.inf)}, "must be integers"),
        ({"x": np.ones((2, 4, 4, 3)), "y": np.full(2, np.nan)}, "must be integers"),
        ({"x": np.ones((2, 4, 4, 3)), "y": np.full(2, 2**64 - 1, np.uint64)}, "can be no class"),
        ({"x": np.ones((2, 4, 4, 3)), "y": np.full(2, "a")}, "must be integers"),
        ({"x": np.full((2, 4, 4, 3), "a"), "y": np.zeros(2, int)}, "must be numbers"),
        ({"x": np.zeros((2, 4, 4, 3), np.uint8), "y": np.full(2, -1)}, "counted from 0"),
        ({"x": np.zeros((2, 4, 4, 3), np.uint8), "y": np.full(2, 0.5)}, "must be integers"),
        ({"x": np.zeros((2, 4, 4, 3), np.uint8), "y": np.full((2, 3), 0.5)}, "not one-hot"),
        ({"x": np.zeros((2, 4, 4, 3), np.uint8), "y": np.zeros((2, 3, 1))}, "labels must be"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(tmp_path / "a.npz"), SHAPE)
    assert "\n" not in str(caught.value)


def test_pickled_arrays_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.asarray([{}], object), y=np.zeros(1))
    with pytest.raises(DataError, match="can't read"):
        load_dataset(str(tmp_path / "a.npz"), SHAPE)


@pytest.mark.parametrize("name", ["no.npz", "no.h5", "nosuch", "no/folder", "tfds"])
def test_missing_sources_are_refused(tmp_path, name):
    with pytest.raises(DataError):
        load_dataset(str(tmp_path / name), SHAPE)


@pytest.mark.parametrize("name", ["a.npz", "a.h5"])
def test_damaged_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04garbage")
    with pytest.raises(DataError, match="can't read"):
        load_dataset(str(tmp_path / name), SHAPE)


def test_labels_in_every_form(rng):
    images, labels = random_images(rng)
    for form in (labels, labels[:, None], np.eye(10)[labels], labels.astype(np.float32), labels.astype(np.uint8)):
        np.testing.assert_array_equal(make_dataset(images, form, "data").labels, labels)


def test_floats_in_the_unit_interval_stay(rng):
    images = rng.random((3, *SHAPE))
    found = make_dataset(images, np.zeros(3, int), "data").images
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, images.astype(np.float32))


def test_true_and_false_are_white_and_black(rng):
    masks = rng.random((3, *SHAPE)) < 0.5
    np.testing.assert_array_equal(make_dataset(masks, np.zeros(3, int), "data").images, np.where(masks, 255, 0))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((10, *SHAPE), 7, np.uint8), "10 have no contrast"),
        (np.full((10, *SHAPE), 0.5, np.float32), "10 have no contrast"),
        (np.random.default_rng(0).random((10, *SHAPE), np.float32) / 255, "divided by 255 twice"),
        (np.random.default_rng(0).integers(100, 103, (10, *SHAPE), np.uint8), "no contrast"),
    ],
)
def test_images_without_contrast_are_refused(images, message):
    with pytest.raises(DataError, match=message):
        Dataset(images, np.zeros(10, int)).check_contrast()
    some = images.copy()
    some[:2, 0, 0, 0] = np.iinfo(np.uint8).max if images.dtype == np.uint8 else 1
    Dataset(some, np.zeros(10, int)).check_contrast()  # two of ten have contrast


def test_data_that_do_not_fit_the_model(rng):
    data = Dataset(*random_images(rng))
    data.check_fits(SHAPE, 10)
    with pytest.raises(DataError, match=r"32x32x3.*28x28x1"):
        data.check_fits((28, 28, 1), 10)
    with pytest.raises(DataError, match="classes"):
        data.check_fits(SHAPE, int(data.labels.max()))
    with pytest.raises(DataError, match="subtract 1"):
        Dataset(data.images[:2], np.asarray([1, 10])).check_fits(SHAPE, 10)
    with pytest.raises(DataError, match="empty"):
        data.take(np.arange(0)).check_fits(SHAPE, 10)


def numbered(count):
    """Images that are all different: each holds its number."""
    images = np.zeros((count, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return Dataset(images, np.zeros(count, np.int64))


def numbers(data):
    return (data.images[:, 0, 0, 0].astype(int) + 256 * data.images[:, 0, 0, 1].astype(int)).tolist()


@given(count=st.integers(2, 300), share=st.floats(0, 1), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_no_image_both_unlearns_and_evaluates(count, share, seed):
    n_clean = min(count - 1, max(1, int(share * count)))
    split = split_dataset(numbered(count), n_clean, seed)
    clean, rest = numbers(split.clean_set), numbers(split.evaluation)
    assert len(clean) == n_clean
    assert sorted(clean + rest) == list(range(count))
    again = split_dataset(numbered(count), n_clean, seed)
    assert numbers(again.clean_set) == clean
    assert clean == np.random.default_rng(seed).permutation(count)[:n_clean].tolist()


def test_the_default_clean_set_is_5000_or_half():
    assert len(split_dataset(numbered(12_000), None, 0).clean_set) == DEFAULT_N_CLEAN
    assert len(split_dataset(numbered(301), None, 0).clean_set) == 150


@pytest.mark.parametrize("n_clean", [0, -3, 10, 11])
def test_clean_sets_that_leave_nothing_are_refused(n_clean):
    with pytest.raises(DataError, match="choose another --n-clean"):
        split_dataset(numbered(10), n_clean, 0)


def test_a_separate_clean_set_never_evaluates():
    data = numbered(30)
    split = separate_clean_set(data.take(np.arange(10)), data, None, 0)
    assert numbers(split.clean_set) == list(range(10))
    assert numbers(split.evaluation) == list(range(10, 30))
    assert split.duplicates == 10
    as_float = Dataset(data.images[:10].astype(np.float32) / 255, data.labels[:10])
    assert separate_clean_set(as_float, data, 4, 0).duplicates == 4
    with pytest.raises(DataError, match="every image"):
        separate_clean_set(data, data, None, 0)
    with pytest.raises(DataError, match="--n-clean 11"):
        separate_clean_set(data.take(np.arange(10)), data, 11, 0)


@pytest.mark.parametrize(("count", "labels"), [(0, []), (2, [3, 1]), (5, [3, 1, 2])])
def test_the_first_images_are_all_where_there_are_fewer(count, labels):
    data = Dataset(np.zeros((3, *SHAPE), np.uint8), np.asarray([3, 1, 2]))
    assert list(data.first(count).labels) == labels
