"""Data sets as they are downloaded. The oracles: torchvision's data sets reading the same folders, and what was written."""

import gzip
import json
import os
import pickle
import re
import struct
import sys

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ibau_jax.data import load_dataset
from ibau_jax.data.memory import FREE
from ibau_jax.data.sources import has_class_folders
from ibau_jax.errors import DataError, IbauError
from tests.cli.commands import AUDIT, EVALUATE, EXAMPLE, run
from tests.data import downloads
from tests.oracles import torchvision_models  # noqa: F401 - before torchvision is imported

from torchvision import datasets  # isort: skip

SHAPE = (32, 32, 3)


def assert_same(found, oracle, shape=SHAPE):
    """`found` has the images of a torchvision data set, in its order, resized as Pillow does."""
    assert len(found) == len(oracle)
    for image, label, (picture, expected) in zip(found.images, found.labels, oracle, strict=True):
        if picture.size != (shape[1], shape[0]):
            picture = picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(image, np.asarray(picture).reshape(shape))
        assert label == expected


class Cifar10(datasets.CIFAR10):
    """Without a look at the digests of the published files."""

    meta = {**datasets.CIFAR10.meta, "md5": None}

    def _check_integrity(self):
        return True


class Cifar100(Cifar10, datasets.CIFAR100):
    base_folder, train_list, test_list = "cifar-100-python", [["train", None]], [["test", None]]
    meta = {"filename": "meta", "key": "fine_label_names", "md5": None}


@pytest.mark.parametrize(
    ("make", "oracle", "classes"), [(downloads.cifar10, Cifar10, 10), (downloads.cifar100, Cifar100, 100)]
)
def test_cifar(tmp_path, rng, make, oracle, classes):
    root = make(tmp_path, rng)
    for spec, train in (
        (f"{root}", False),
        (f"{root}:test", False),
        (f"{tmp_path}:train", True),
        (f"{root}/:training", True),
    ):
        found, expected = load_dataset(spec, SHAPE, num_classes=classes), oracle(tmp_path, train=train)
        assert_same(found, expected)
        assert found.class_names == tuple(expected.classes)
    with pytest.raises(DataError, match=f"{classes} classes, but the model has 43"):
        load_dataset(str(root), SHAPE, num_classes=43)
    with pytest.raises(DataError, match="no split 'val'; there is .*:test, .*:train"):
        load_dataset(f"{root}:val", SHAPE)
    with pytest.raises(DataError, match="only a folder of class folders"):
        load_dataset(str(root), SHAPE, class_order="text")


def test_cifar_for_a_model_of_other_images(tmp_path, rng):
    root = downloads.cifar10(tmp_path, rng)
    assert_same(load_dataset(str(root), (64, 48, 3)), Cifar10(tmp_path, train=False), (64, 48, 3))
    grey = load_dataset(str(root), (32, 32, 1))
    expected = [np.asarray(picture.convert("L")) for picture, _ in Cifar10(tmp_path, train=False)]
    np.testing.assert_array_equal(grey.images[..., 0], expected)


def test_a_pickle_of_python_3(tmp_path, rng):
    """`pickle.load(file, encoding="bytes")` and a dump of that: names are bytes."""
    root = downloads.cifar10(tmp_path, rng)
    expected = load_dataset(str(root), SHAPE)
    for file in root.iterdir():
        content = pickle.loads(file.read_bytes(), encoding="bytes")
        file.write_bytes(pickle.dumps(content))
    found = load_dataset(str(root), SHAPE)
    np.testing.assert_array_equal(found.images, expected.images)
    assert found.class_names == tuple(downloads.CIFAR10_NAMES)
    (root / "batches.meta").unlink()
    assert load_dataset(str(root), SHAPE).class_names == ()


@pytest.mark.parametrize(("folder", "names", "labels", "test"), [
    ("cifar-10-batches-bin", "batches.meta.txt", 1, "test_batch.bin"), ("cifar-100-binary", "fine_label_names.txt", 2, "test.bin"),
])  # fmt: skip
def test_the_binary_version(tmp_path, rng, folder, names, labels, test):
    root = tmp_path / folder
    root.mkdir()
    (root / names).write_text("cat\ndog\n\n")
    pixels = rng.integers(0, 256, (5, 3, 32, 32), np.uint8)
    classes = rng.integers(0, 2, 5, np.uint8)
    rows = [bytes([9] * (labels - 1) + [label]) + image.tobytes() for label, image in zip(classes, pixels, strict=True)]
    (root / test).write_bytes(b"".join(rows))
    found = load_dataset(str(tmp_path), SHAPE, num_classes=2)
    np.testing.assert_array_equal(found.images.transpose(0, 3, 1, 2), pixels)
    assert (found.labels.tolist(), found.class_names) == (classes.tolist(), ("cat", "dog"))
    (root / test).write_bytes(b"".join(rows)[:-1])
    with pytest.raises(DataError, match="ends within an image"):
        load_dataset(str(tmp_path), SHAPE)
    (root / test).unlink()
    with pytest.raises(DataError, match="can't read"):
        load_dataset(str(tmp_path), SHAPE)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "oracle"), [("MNIST", datasets.MNIST), ("FashionMNIST", datasets.FashionMNIST)])
def test_mnist(tmp_path, rng, packed, name, oracle):
    root = downloads.mnist(tmp_path, rng, packed, name)
    found = {
        train: load_dataset(f"{place}{split}", (28, 28, 1))
        for place, split, train in ((tmp_path, "", False), (root, ":train", True))
    }
    assert found[False].images.shape == (6, 28, 28, 1)
    if packed:
        for file in root.iterdir():
            (root / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    for train, images in found.items():
        assert_same(images, oracle(tmp_path, train=train), (28, 28, 1))
    colours = load_dataset(str(root.parent), SHAPE)
    assert_same(colours, [(picture.convert("RGB"), label) for picture, label in oracle(tmp_path, train=False)])


def test_a_folder_of_several_data_sets_names_them(tmp_path, rng):
    downloads.mnist(tmp_path, rng)
    downloads.cifar10(tmp_path, rng)
    with pytest.raises(DataError, match="several data sets; name one: .*cifar-10-batches-py, .*MNIST/raw"):
        load_dataset(str(tmp_path), SHAPE)


def test_gtsrb_as_torchvision_has_it(tmp_path, rng):
    downloads.gtsrb(tmp_path / "gtsrb", rng, "Training", "GT-final_test.csv")
    for split in ("test", "train"):
        oracle = datasets.GTSRB(tmp_path, split=split)
        for place in (tmp_path, tmp_path / "gtsrb", tmp_path / "gtsrb" / "GTSRB"):
            assert_same(load_dataset(f"{place}:{split}", SHAPE, num_classes=4), oracle)


@pytest.mark.parametrize(
    "table",
    [
        "GTSRB/Final_Test/GT-final_test.csv",
        "GTSRB/Final_Test/Images/GT-final_test.csv",
        "GTSRB/GT-final_test.csv",
        "GT-final_test.csv",
    ],
)
def test_gtsrb_as_its_archives_unpack(tmp_path, rng, table):
    root = downloads.gtsrb(tmp_path, rng, table=table)
    found = load_dataset(str(tmp_path), SHAPE, num_classes=43)
    assert found.labels.tolist() == [3, 0, 2, 2, 1, 3]
    with Image.open(root / "Final_Test" / "Images" / "00002.ppm") as picture:
        np.testing.assert_array_equal(found.images[2], picture.resize((32, 32), Image.Resampling.BICUBIC))
    train = load_dataset(f"{root}:train", SHAPE, num_classes=43)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    direct = load_dataset(str(root / "Final_Training" / "Images"), SHAPE, num_classes=43)
    np.testing.assert_array_equal(direct.images, train.images)


def test_gtsrb_of_kaggle(tmp_path, rng):
    """`Train/CLASS`, `Test.csv` with paths; a model that ImageFolder trained has the classes in the order of text."""
    (tmp_path / "Test").mkdir()
    rows = ["Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path"]
    for index, label in enumerate([11, 2, 0]):
        downloads.picture(rng).save(tmp_path / "Test" / f"{index:05d}.png")
        rows.append(f"32,32,5,5,20,20,{label},Test/{index:05d}.png")
    (tmp_path / "Test.csv").write_text("\n".join(rows))
    for label in range(12):
        (tmp_path / "Train" / str(label)).mkdir(parents=True)
        downloads.picture(rng).save(tmp_path / "Train" / str(label) / "a.png")
    assert load_dataset(str(tmp_path), SHAPE, num_classes=12).labels.tolist() == [11, 2, 0]
    order = datasets.ImageFolder(tmp_path / "Train").class_to_idx
    by_text = load_dataset(str(tmp_path), SHAPE, num_classes=12, class_order="text")
    assert by_text.labels.tolist() == [order["11"], order["2"], order["0"]]
    assert_same(
        load_dataset(f"{tmp_path}:train", SHAPE, num_classes=12, class_order="text"),
        datasets.ImageFolder(tmp_path / "Train"),
    )


def test_tiny_imagenet(tmp_path, rng):
    root, shape = downloads.tiny_imagenet(tmp_path, rng), (64, 64, 3)
    oracle = datasets.ImageFolder(root / "train")
    assert_same(load_dataset(f"{root}:train", shape, num_classes=3), oracle, shape)
    found = load_dataset(str(tmp_path), shape, num_classes=3)
    assert found.labels.tolist() == [
        oracle.class_to_idx[name] for name in ("n01443537", "n02124075", "n04067472", "n04067472", "n01443537")
    ]
    assert found.class_names == ("goldfish", "Egyptian cat", "reel")
    listed = load_dataset(str(root), shape, num_classes=3, class_order=str(root / "wnids.txt"))
    assert listed.labels.tolist() == [2, 0, 1, 1, 2]
    assert listed.class_names == ("Egyptian cat", "reel", "goldfish")
    with pytest.raises(DataError, match=r"have no labels; name .*:val"):
        load_dataset(f"{root}:test", shape)
    with pytest.raises(DataError, match="the model has 200 classes"):
        load_dataset(str(root), shape, num_classes=200)
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():  # as many scripts move them
        name, number = line.split("\t")[:2]
        (root / "val" / number).mkdir(exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / number / name)
    (root / "val" / "images").rmdir()
    assert_same(load_dataset(str(root), shape, num_classes=3), datasets.ImageFolder(root / "val"), shape)


@pytest.mark.parametrize(("folders", "split", "chosen"), [
    (["train", "val", "test"], "", "test"), (["train", "val"], "", "val"), (["Train", "Validation"], "", "Validation"),
    (["train", "val"], ":train", "train"), (["training", "testing"], ":test", "testing"), (["test"], "", "test"),
])  # fmt: skip
def test_folders_of_splits(tmp_path, rng, folders, split, chosen):
    for folder in folders:
        for name in ("cat", "dog", "images"):
            (tmp_path / folder / name).mkdir(parents=True)
            downloads.picture(rng).save(tmp_path / folder / name / "a.png")
    found = load_dataset(f"{tmp_path}{split}", SHAPE, num_classes=3)
    assert_same(found, datasets.ImageFolder(tmp_path / chosen))
    assert found.class_names == ("cat", "dog", "images")
    assert has_class_folders(f"{tmp_path}{split}")


def test_splits_that_are_not_there(tmp_path, rng):
    for name in ("train/cat", "train/dog"):
        (tmp_path / name).mkdir(parents=True)
        downloads.picture(rng).save(tmp_path / name / "a.png")
    with pytest.raises(DataError, match=r"no split for tests; there is .*:train"):
        load_dataset(str(tmp_path), SHAPE)
    (tmp_path / "TRAINING" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="are one split"):
        load_dataset(f"{tmp_path}:train", SHAPE)
    with pytest.raises(DataError, match="has no split 'train'"):
        load_dataset(f"{tmp_path / 'train'}:train", SHAPE)


def test_a_folder_called_as_a_source(tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits/test/cat", "digits/test/dog"):
        (tmp_path / name).mkdir(parents=True)
        downloads.picture(rng).save(tmp_path / name / "a.png")
    assert (len(load_dataset("digits:test", SHAPE)), len(load_dataset("digits/:test", SHAPE))) == (800, 2)
    assert not has_class_folders("digits:test")


def test_classes_called_train_and_test(tmp_path, rng):
    for name in ("train", "test", "plane/images"):
        (tmp_path / name).mkdir(parents=True)
        downloads.picture(rng).save(tmp_path / name / "a.png")
    found = load_dataset(str(tmp_path), SHAPE, num_classes=3)
    assert (found.labels.tolist(), found.class_names) == ([0, 1, 2], ("plane", "test", "train"))


def test_arrays_by_whatever_name(tmp_path, rng):
    images, labels = rng.integers(0, 256, (5, *SHAPE), np.uint8), rng.integers(0, 10, 5)
    other, others = rng.integers(0, 256, (3, *SHAPE), np.uint8), rng.integers(0, 10, 3)
    layouts = {
        "keras": ({"x_test": images, "y_test": labels, "x_train": other, "y_train": others}, ""),
        "medmnist": (
            {
                "train_images": other,
                "train_labels": others[:, None],
                "test_images": images,
                "test_labels": labels[:, None],
            },
            ":test",
        ),
        "upper": ({"X": images, "Y": np.eye(10)[labels]}, ""),
        "by shape": ({"pictures": images, "categories": labels, "epochs": np.arange(7)}, ""),
        "named": ({"pictures": images, "categories": labels, "ids": np.arange(5)}, ":pictures,categories"),
        "images": ({"images": images, "labels": labels, "ids": np.arange(5)}, ""),
    }
    for name, (arrays, split) in layouts.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["notes"], file["link"] = "text", h5py.ExternalLink("other.h5", "/x")
            file.create_group("group")
            for key, array in arrays.items():
                file[key] = array
        for suffix in (".npz", ".h5"):
            found = load_dataset(f"{tmp_path / name}{suffix}{split}", SHAPE)
            np.testing.assert_array_equal(found.images, images)
            np.testing.assert_array_equal(found.labels, labels)
    for suffix in (".npz", ".h5"):
        assert len(load_dataset(f"{tmp_path}/medmnist{suffix}:train", SHAPE)) == 3
        with pytest.raises(DataError, match=r"lacks x and y; it holds .*name images and labels by .*:IMAGES,LABELS"):
            load_dataset(f"{tmp_path}/named{suffix}", SHAPE)
        with pytest.raises(DataError, match="lacks nosuch"):
            load_dataset(f"{tmp_path}/named{suffix}:pictures,nosuch", SHAPE)


def parquet_file(file, images, labels, image="image", label="label", names=None):
    """As the library `datasets` writes one."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    rows = [{"bytes": content, "path": None} for content in images]
    table = arrow.table({image: arrow.array(rows, kind), label: arrow.array(labels, arrow.int64())})
    if names:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file)


def test_parquet(tmp_path, rng):
    images = rng.integers(0, 256, (7, *SHAPE), np.uint8)
    labels = rng.integers(0, 2, 7)
    encoded = [downloads.png(Image.fromarray(image)) for image in images]
    for number, part in enumerate((slice(0, 4), slice(4, 7))):
        file = tmp_path / "cifar10" / "plain_text" / f"test-0000{number}-of-00002.parquet"
        parquet_file(file, encoded[part], labels[part], "img", names=["cat", "dog"])
    parquet_file(
        tmp_path / "cifar10" / "plain_text" / "train-00000-of-00001.parquet",
        encoded[:1],
        labels[:1],
        "img",
        "fine_label",
    )
    for spec in ("cifar10", "cifar10:test", "cifar10/plain_text:test"):
        found = load_dataset(f"{tmp_path}/{spec}", SHAPE, num_classes=2)
        np.testing.assert_array_equal(found.images, images)
        np.testing.assert_array_equal(found.labels, labels)
        assert found.class_names == ("cat", "dog")
    assert len(load_dataset(f"{tmp_path}/cifar10:train", SHAPE)) == 1
    assert len(load_dataset(f"{file}", SHAPE)) == 3
    with pytest.raises(DataError, match="2 classes, but the model has 10"):
        load_dataset(str(file), SHAPE, num_classes=10)
    parquet_file(tmp_path / "only" / "0000.parquet", encoded, labels)
    assert len(load_dataset(f"{tmp_path}/only", SHAPE)) == 7


@pytest.mark.parametrize(("images", "labels", "names", "message"), [
    ([None], [0], {}, "row 0 .* is not in the file"),
    ([b"x"], [0], {}, "damaged, or none of PNG"),
    ([b"x"], [None], {}, "has no label"),
    ([b"x"], [0], {"image": "label", "label": "image"}, "is not in the file|no single column|damaged, or"),
])  # fmt: skip
def test_wrong_parquet(tmp_path, images, labels, names, message):
    parquet_file(tmp_path / "a.parquet", images, labels, **names)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(tmp_path / "a.parquet"), SHAPE)
    assert "\n" not in str(caught.value)


def test_parquet_without_images_or_pyarrow(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["a"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no single column of encoded images .* it has text: string, label: int64"):
        load_dataset(str(tmp_path / "a.parquet"), SHAPE)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install -e '\.\[parquet\]'"):
        load_dataset(str(tmp_path / "a.parquet"), SHAPE)


def test_archives_are_to_be_unpacked(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="is an archive; unpack it"):
        load_dataset(str(tmp_path / "cifar-10-python.tar.gz"), SHAPE)


GOOD = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
EXECUTING = b"\x80\x02cposix\nsystem\nU\x0etouch executed\x85R."
CIFAR_FILES = {
    "a call": (EXECUTING, "calls posix.system|names posix.system|which no data set needs"),
    "a call in a dict": (b"\x80\x02}(U\x04data" + EXECUTING[2:-1] + b"u.", "calls posix.system|which no data set needs"),
    "no pickle": (b"GIF89a", "unpack the data set's archive anew"),
    "empty": (b"", "truncated"),
    "a list": (downloads.python2_pickle([1]), "no pickle of a dict"),
    "no data": (downloads.python2_pickle({"labels": [0]}), "'data' is no array"),
    "another width": (downloads.python2_pickle({**GOOD, "data": np.zeros((2, 3071), np.uint8)}), "'data' is no array"),
    "floats": (downloads.python2_pickle({**GOOD, "data": np.zeros((2, 3072))}), "'data' is no array"),
    "images in a list": (downloads.python2_pickle({**GOOD, "data": [[0] * 3072]}), "'data' is no array"),
    "no labels": (downloads.python2_pickle({"data": GOOD["data"]}), "'labels' is no list"),
    "labels as text": (downloads.python2_pickle({**GOOD, "labels": ["0", "1"]}), "'labels' is no list"),
    "a negative label": (downloads.python2_pickle({**GOOD, "labels": [0, -1]}), "counted from 0"),
    "a huge label": (downloads.python2_pickle({**GOOD, "labels": [0, 2**30]}), "can be no class"),
    "an endless label": (pickle.dumps({**GOOD, "labels": [0, 2**70]}), "labels must be integers"),
    "too many labels": (downloads.python2_pickle({**GOOD, "labels": [0] * 9}), "2 images but 9 labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", CIFAR_FILES)
def test_cifar_files_that_are_none(tmp_path, monkeypatch, name):
    content, message = CIFAR_FILES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(tmp_path), SHAPE)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [file.name for file in tmp_path.iterdir()] == ["test_batch"]


def test_labels_beyond_the_models_classes(tmp_path):
    (tmp_path / "test_batch").write_bytes(downloads.python2_pickle({**GOOD, "labels": [0, 10]}))
    with pytest.raises(DataError, match="label 10, but the model has 10 classes"):
        load_dataset(str(tmp_path), SHAPE, num_classes=10).check_fits(SHAPE, 10)


IDX = {
    "another kind": (b"\0\0\x0d\3" + struct.pack(">3I", 1, 28, 28) + bytes(784), "no idx file of bytes with 3 axes"),
    "labels": (downloads.idx(np.zeros(6, np.uint8)), "no idx file of bytes with 3 axes"),
    "cut off": (downloads.idx(np.zeros((6, 28, 28), np.uint8))[:-1], "4703 bytes or more, not 4704"),
    "more": (downloads.idx(np.zeros((6, 28, 28), np.uint8)) + b"x", "not 4704 as it declares"),
    "huge": (struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 2**31), "meant to fill memory"),
    "more images": (downloads.idx(np.zeros((7, 28, 28), np.uint8)), "7 images but 6 labels"),
    "no size": (downloads.idx(np.zeros((6, 0, 28), np.uint8)), "without pixels"),
    "empty": (b"", "no idx file"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", IDX)
def test_idx_files_that_lie(tmp_path, rng, name, packed):
    content, message = IDX[name]
    root = downloads.mnist(tmp_path, rng)
    (root / "t10k-images-idx3-ubyte").unlink()
    file = root / f"t10k-images-idx3-ubyte{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(root), (28, 28, 1))
    assert "\n" not in str(caught.value)


def test_a_gzipped_bomb(tmp_path, rng):
    root = downloads.mnist(tmp_path, rng)
    (root / "t10k-images-idx3-ubyte").unlink()
    file = root / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(downloads.idx(np.zeros((2 * FREE // 10_000, 100, 100), np.uint8))))
    with pytest.raises(DataError, match="meant to fill memory"):
        load_dataset(str(root), (28, 28, 1))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="t10k-images"):
        load_dataset(str(root), (28, 28, 1))
    (root / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="no t10k-labels"):
        load_dataset(str(root), (28, 28, 1))


TABLES = [
    ("", "no table with a Filename"),
    ("Filename;ClassId\n", "no table with a Filename"),
    ("Filename;Width\n00000.ppm;3\n", "no table with a Filename"),
    ("Filename;ClassId\n00000.ppm;x\n", "no table with a Filename"),
    ("Filename;ClassId\n00000.ppm;-1\n", "no table with a Filename"),
    ("Filename;ClassId\n00000.ppm;99999999999\n", "no table with a Filename"),
    ("Filename;ClassId\n00000.ppm\n", "no table with a Filename"),
    ("Filename;ClassId\n00000.ppm;43\n", "can be no label of a model with 43 classes"),
    ("Filename;ClassId\nnosuch.ppm;1\n", "nosuch.ppm"),
    ("Filename;ClassId\n/etc/passwd;1\n", "no name of an image"),
    ("Filename;ClassId\n..;1\n", "no name of an image"),
    ("Filename;ClassId\n../../secret.ppm;1\n", "can't read"),
    ('Filename;ClassId\n"' + "x" * 200_000 + '";1\n', "field larger|no name of an image"),
    ("\xff\xfe", "no text in UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), TABLES)
def test_tables_that_list_no_images(tmp_path, rng, text, message):
    root = downloads.gtsrb(tmp_path, rng)
    downloads.picture(rng).save(root / "secret.ppm")
    (root / "Final_Test" / "GT-final_test.csv").write_text(text, "latin1")
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(root), SHAPE, num_classes=43)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_gtsrb_without_its_table(tmp_path, rng):
    root = downloads.gtsrb(tmp_path, rng)
    (root / "Final_Test" / "GT-final_test.csv").unlink()
    with pytest.raises(DataError, match=r"no GT-final_test.csv beside it.*:train"):
        load_dataset(str(root), SHAPE)


@pytest.mark.parametrize(("text", "message"), [
    ("val_0.JPEG\tn99999999\n", "'n99999999', which wnids.txt does not list"), ("val_0.JPEG\n", "which wnids.txt does not list"),
    ("../x\tn01443537\n", "no name of an image"), ("\xff", "no text in UTF-8"),
])  # fmt: skip
def test_annotations_that_are_none(tmp_path, rng, text, message):
    root = downloads.tiny_imagenet(tmp_path, rng)
    (root / "val" / "val_annotations.txt").write_text(text, "latin1")
    with pytest.raises(DataError, match=message):
        load_dataset(str(root), (64, 64, 3), num_classes=3)


MADE = {
    "cifar10": (downloads.cifar10, ["test_batch", "batches.meta"]),
    "cifar100": (downloads.cifar100, ["test", "meta"]),
    "mnist": (downloads.mnist, ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]),
    "gtsrb": (downloads.gtsrb, ["Final_Test/GT-final_test.csv", "Final_Test/Images/00000.ppm"]),
    "tiny": (downloads.tiny_imagenet, ["wnids.txt", "val/val_annotations.txt", "words.txt"]),
}


@pytest.mark.parametrize("name", MADE)
def test_pipes_and_devices_are_not_opened(tmp_path, rng, name):
    make, files = MADE[name]
    root = make(tmp_path, rng)
    for file in files:
        content = (root / file).read_bytes()
        for replace in (lambda place: os.mkfifo(place), lambda place: place.symlink_to("/dev/zero")):
            (root / file).unlink()
            replace(root / file)
            with pytest.raises(IbauError, match="no regular file"):
                load_dataset(str(root), SHAPE)
        (root / file).unlink()
        (root / file).write_bytes(content)
    load_dataset(str(root), SHAPE)


@pytest.mark.parametrize("name", MADE)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_files_give_images_or_one_line(tmp_path_factory, name, data):
    make, files = MADE[name]
    root = make(tmp_path_factory.mktemp(name), np.random.default_rng(0))
    file = root / data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(300, len(content) - 1)))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    file.write_bytes(content)
    try:
        found = load_dataset(str(root), SHAPE)
        assert found.images.shape[1:] == SHAPE
        assert found.images.dtype == np.uint8
        assert (found.labels >= 0).all()
    except IbauError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000


def test_a_command_takes_a_folder_as_it_was_downloaded(tmp_path):
    """The example's digits as CIFAR-10's pickles, compared with the same images from the embedded data."""
    digits = load_dataset("digits", SHAPE).first(300)
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = np.ascontiguousarray(digits.images.transpose(0, 3, 1, 2)).reshape(-1, 3072)
    (root / "test_batch").write_bytes(downloads.python2_pickle({"data": pixels, "labels": digits.labels.tolist()}))
    np.savez(tmp_path / "same.npz", x=digits.images, y=digits.labels)
    command = [*EVALUATE, "--ckpt", EXAMPLE, "--json", "--dataset"]
    results = [run(*command, spec, cwd=tmp_path) for spec in (tmp_path, tmp_path / "same.npz", f"{root}:val")]
    assert [done.returncode for done in results] == [0, 0, 2], results[0].stderr
    assert json.loads(results[0].stdout)["acc"] == json.loads(results[1].stdout)["acc"] > 0.9
    assert results[2].stderr.count("\n") == 1
    assert "no split 'val'" in results[2].stderr


@pytest.mark.slow
def test_an_audit_shows_the_classes_names(tmp_path):
    digits = load_dataset("digits", SHAPE).first(200)
    names = [f"[red]name{label}\x1b" for label in range(10)]
    pixels = np.ascontiguousarray(digits.images.transpose(0, 3, 1, 2)).reshape(-1, 3072)
    (tmp_path / "test_batch").write_bytes(downloads.python2_pickle({"data": pixels, "labels": digits.labels.tolist()}))
    (tmp_path / "batches.meta").write_bytes(downloads.python2_pickle({"label_names": names}))
    done = run(*AUDIT, "--ckpt", EXAMPLE, "--dataset", tmp_path, "--audit-steps", 3, "--audit-images", 20, cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr
    assert re.search(r"class (\d) \(\[red\]name\1\?\)", done.stdout)
    assert "\x1b" not in done.stdout
