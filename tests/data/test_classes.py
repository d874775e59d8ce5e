"""Which label a class folder has. The oracles: the numbers themselves, and torchvision's ImageFolder."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ibau_jax.cli.job import load_images, load_split, load_subject
from ibau_jax.cli.options import DataOptions, DeviceOptions, ModelOptions
from ibau_jax.cli.poison_options import PoisonOptions
from ibau_jax.cli.poison_plan import images as training_images
from ibau_jax.data import load_dataset
from ibau_jax.data.classes import class_labels
from ibau_jax.errors import IbauError
from tests.conftest import ROOT

SHAPE = (4, 4, 3)


@pytest.fixture
def folder(tmp_path):
    """Makes class folders of one image each, whose grey level tells the place in `names`; none for those in `empty`."""

    def make(names, empty=()):
        for place, name in enumerate(names):
            path = tmp_path / name
            path.mkdir(parents=True)
            if name not in empty:
                Image.new("RGB", (4, 4), (place, place, place)).save(path / "a.png")
        return tmp_path

    return make


def image_folder(path):
    """`class_to_idx` of torchvision's ImageFolder: torchvision.datasets.folder.find_classes, word by word."""
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    return {cls_name: i for i, cls_name in enumerate(classes)}


def loaded(path, names, num_classes=None, class_order=None):
    """The label that each folder's image got."""
    data = load_dataset(str(path), SHAPE, num_classes=num_classes, class_order=class_order)
    return {names[image[0, 0, 0]]: label for image, label in zip(data.images, data.labels.tolist(), strict=True)}


@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("missing", [None, 0, 3, 11])
def test_numbers_are_labels(folder, padded, missing):
    names = [f"{label:0{padded}d}" for label in range(12) if label != missing]
    assert loaded(folder(names), names, 12) == {name: int(name) for name in names}


def test_numbers_are_labels_where_the_number_of_classes_is_not_known(folder):
    names = ["0", "2", "10"]
    assert loaded(folder(names), names) == {"0": 0, "2": 2, "10": 10}


def test_numbers_from_1_have_their_places(folder):
    names = [str(number) for number in range(1, 13)]
    assert loaded(folder(names), names, 12) == {name: int(name) - 1 for name in names}
    with pytest.raises(IbauError, match=r"'12' can be no label of a model with 12 classes .* folders are 11"):
        class_labels([name for name in names if name != "4"], 12)


@pytest.mark.parametrize("names", [["cat", "Dog", "ant"], [str(n) for n in range(12)], [f"c{n}" for n in range(12)]])
def test_text_is_torchvisions_order(folder, names):
    path = folder(names)
    assert loaded(path, names, len(names), "text") == image_folder(path)
    order = path.parent / "order.json"
    order.write_text(json.dumps(image_folder(path)))
    assert loaded(path, names, len(names), str(order)) == image_folder(path)


def test_words_are_in_the_order_of_text_unless_their_numbers_are_asked_for(folder):
    names = [f"digit_{label}" for label in range(12)]
    path = folder(names)
    assert loaded(path, names, 12) == image_folder(path)
    assert loaded(path, names, 12, "number") == {name: label for label, name in enumerate(names)}


def test_a_missing_word_is_never_a_shift(folder):
    names = [f"digit_{label}" for label in range(10) if label != 3]
    path = folder(names)
    with pytest.raises(IbauError, match=r"9 class folders \(digit_0, .*, digit_9\), but the model has 10 classes"):
        loaded(path, names, 10)
    assert loaded(path, names, 10, "number") == {name: int(name[-1]) for name in names}
    (path / "digit_3").mkdir()
    assert loaded(path, names, 10) == {name: int(name[-1]) for name in names}


def test_a_file_lists_the_labels(folder, tmp_path_factory):
    names = ["cat", "dog"]
    path, order = folder(names), tmp_path_factory.mktemp("order") / "names.txt"
    order.write_text("dog\n\nbird\ncat\n")
    assert loaded(path, names, 3, str(order)) == {"dog": 0, "cat": 2}
    with pytest.raises(IbauError, match="lists 3 classes .* but the model has 2"):
        loaded(path, names, 2, str(order))
    order.write_text("dog\nbird\n")
    with pytest.raises(IbauError, match="does not list the class folders cat"):
        loaded(path, names, 2, str(order))


@pytest.mark.parametrize(
    "content",
    ['{"1": "caf\u00e9", "0": "dog"}', '{"caf\u00e9": 1, "dog": 0}', '["dog", "cafe\u0301"]', "dog\ncafe\u0301"],
)
@pytest.mark.parametrize("name", ["caf\u00e9", "cafe\u0301"])
def test_forms_of_a_list(tmp_path, content, name):
    """`class_to_idx`, its inverse, a list; and accents that another system writes as a character of their own."""
    (tmp_path / "order").write_text(content, encoding="utf-8")
    assert class_labels([name, "dog"], 2, str(tmp_path / "order")) == {name: 1, "dog": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog\ndog\n", "dog more than once"),
        ("caf\u00e9\ncafe\u0301\n".encode(), "more than once"),
        (b'{"cat": 0, "dog": 1, "cat": 1, "dog": 0}', "more than once"),
        (b"", "no class names"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
        ("cat\ndog\n".encode("utf-16"), "no text in UTF-8"),
        (b'{"0": "cat", "1": "cat"}', "each once"),
        (b"[" * 100_000, "can't read"),
        (b"[1, 2]", "no class names"),
        (b'{"cat": 0, "dog": 2}', "0 to 1, each once"),
        (b'{"cat": true, "dog": 0}', "each once"),
        (b'{"cat": "0", "dog": 1}', "each once"),
        (b'{"0": ["n01440764", "tench"]}', "each once"),
    ],
)
def test_files_that_list_no_labels(tmp_path, content, message):
    (tmp_path / "order").write_bytes(content)
    with pytest.raises(IbauError, match=message) as caught:
        class_labels(["cat", "dog"], 2, str(tmp_path / "order"))
    assert "\n" not in str(caught.value)


def test_folders_of_one_name_in_two_spellings(tmp_path):
    (tmp_path / "order").write_text("caf\u00e9\ndog\n", encoding="utf-8")
    with pytest.raises(IbauError, match="one name in two spellings"):
        class_labels(["caf\u00e9", "cafe\u0301"], 2, str(tmp_path / "order"))


@pytest.mark.parametrize(
    ("names", "num_classes", "order", "message"),
    [
        (["0", "00"], 2, None, "same number"),
        (["0", "1", "extra"], 2, None, "3 class folders .*no numbers: extra.*2 classes; remove what is no class"),
        (["cat", "dog"], 2, "number", "no numbers, and no word with a number"),
        (["cat", "dog"], 2, "nosuch", "no file nosuch"),
        (["cat", "dog"], 2, "a" * 5000, r"no file a+\.\.\. \(5,000 characters\)"),
        (["9" * 25], None, None, "can be no label"),
    ],
)
def test_folders_that_do_not_fit(names, num_classes, order, message):
    with pytest.raises(IbauError, match=message):
        class_labels(names, num_classes, order)


def test_what_is_no_class(folder):
    names = [f"c{label}" for label in range(10)]
    path = folder([*names, "__MACOSX/c0", ".hidden", "junk"], empty=["__MACOSX/c0", "junk"])
    (path / "__MACOSX" / "c0" / "._a.png").write_bytes(b"\0\5\x16\7")
    (path / "junk" / "._a.png").write_bytes(b"\0\5\x16\7")
    (path / "c0" / "._a.png").write_bytes(b"\0\5\x16\7")
    assert loaded(path, names, 10) == {name: int(name[1]) for name in names}


def test_both_orders_of_numbers(folder):
    """In the order of text the labels are the places in Python's own sorting."""
    names = [str(label) for label in range(43)]
    path = folder(names)
    whole = sorted(names)
    assert loaded(path, names, 43, class_order="number") == {name: int(name) for name in names}
    assert loaded(path, names, 43, class_order="text") == {name: whole.index(name) for name in names}


def test_commands_compare_folders_with_the_models_classes(folder):
    subject = load_subject(ModelOptions(ckpt=ROOT / "examples" / "badnets_digits.pth"))
    path = folder([f"c{label}" for label in range(10) if label != 3])
    for image in path.rglob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(image)
    with pytest.raises(IbauError, match="9 class folders .* 10 classes"):
        load_images(DataOptions(str(path)), subject)
    images = load_images(DataOptions(str(path), class_order="number"), subject)
    assert images.labels.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    split = load_split(DataOptions("digits", clean_set=str(path), class_order="number"), subject, 0)
    assert split.clean_set.labels.tolist() == images.labels.tolist()
    with pytest.raises(IbauError, match="--class-order is for folders"):
        load_images(DataOptions("digits", class_order="text"), subject)
    with pytest.raises(IbauError, match="only a folder"):
        load_dataset("digits", SHAPE, class_order="text")


def test_poisoned_models_are_trained_on_all_their_classes(folder):
    path = folder([str(label) for label in range(1, 4)])
    for image in path.rglob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)).save(image)
    options = PoisonOptions(str(path), path, DeviceOptions(), test=str(path))
    with pytest.raises(IbauError, match="no image of class 0"):
        training_images(options, SHAPE)
    training, test = training_images(replace(options, class_order="text"), SHAPE)
    assert training.labels.tolist() == test.labels.tolist() == [0, 1, 2]
