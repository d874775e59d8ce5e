"""TFDS data through `as_data_source`, without TensorFlow, prepared here from PNG bytes in a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

PREPARE = """
import io, sys
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

class {name}(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = dict(image=tfds.features.Image(shape={shape}), label=tfds.features.ClassLabel({labels}))
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return dict(test=self._generate_examples(7), train=self._generate_examples(4))

    def _generate_examples(self, count):
        for index in range(count):
            png = io.BytesIO()
            height = 32 + (index if {shape}[0] is None else 0)
            Image.fromarray(np.full((height, 32, 3), 20 * index, np.uint8)).save(png, "png")
            png.seek(0)
            yield index, dict(image=png, label=index % 3)

{name}(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""

LOAD = """
import sys
from ibau_jax.data import load_dataset
from ibau_jax.errors import DataError
try:
    found = load_dataset(sys.argv[1], (32, 32, 3))
    order = found.images[:, 0, 0, 0].argsort()
    print(found.images.shape, found.images.dtype, found.images[order, 5, 5, 0].tolist(), found.labels[order].tolist(), *found.class_names)
except DataError as error:
    print("error:", error)
assert "tensorflow" not in sys.modules
"""


def run(program, *arguments, data_dir=None):
    environment = {**os.environ, **({"TFDS_DATA_DIR": str(data_dir)} if data_dir else {})}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for name, shape, labels in (
        ("FixedSize", (32, 32, 3), "num_classes=3"),
        ("VaryingSize", (None, None, 3), "names=['cat', 'dog', 'ship']"),
    ):
        run(PREPARE.format(name=name, shape=shape, labels=labels), str(folder))
    return folder


@pytest.mark.parametrize(("name", "class_names"), [("fixed_size", ""), ("varying_size", " cat dog ship")])
def test_prepared_data_are_read_and_resized(prepared, name, class_names):
    expected = "(7, 32, 32, 3) uint8 [0, 20, 40, 60, 80, 100, 120] [0, 1, 2, 0, 1, 2, 0]"
    assert run(LOAD, f"tfds:{name}", data_dir=prepared) == expected + class_names
    assert run(LOAD, f"tfds:{name}:train", data_dir=prepared).startswith("(4, 32, 32, 3)")


def test_wrong_names_and_splits(prepared):
    assert "no split 'valid'; it has" in run(LOAD, "tfds:fixed_size:valid", data_dir=prepared)
    assert run(LOAD, "tfds:no_such_data_set", data_dir=prepared).startswith("error: TensorFlow Datasets can't build")


def test_data_prepared_for_tensorflow_say_how_to_prepare_them(tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "test", "numBytes": "10", "shardLengths": ["10000"], "filepathTemplate": template}
    info = {"name": "cifar10", "version": "3.0.2", "fileFormat": "tfrecord", "splits": [split]}
    info["moduleName"] = "tensorflow_datasets.image_classification.cifar"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    message = run(LOAD, "tfds:cifar10", data_dir=tmp_path)
    assert "is prepared as tfrecord" in message
    assert "file_format='array_record'" in message


def test_damaged_data_are_refused(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    (records,) = (tmp_path / "copy" / "fixed_size").rglob("*test.array_record*")
    data = bytearray(records.read_bytes())
    for place in range(0, len(data), 50):
        data[place] ^= 0xFF
    records.write_bytes(data)
    assert run(LOAD, "tfds:fixed_size", data_dir=tmp_path / "copy").startswith("error: can't read tfds:fixed_size")


def test_unprepared_data_say_what_to_install(tmp_path):
    message = run(LOAD, "tfds:cifar10", data_dir=tmp_path)
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        assert "not prepared" in message
        assert "[tfds]" in message
    else:
        assert "preparing tfds:cifar10 failed" in message
    assert np.asarray(list(tmp_path.rglob("*.array_record*"))).size == 0
