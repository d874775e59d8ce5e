"""Makes small data sets in the form in which they are downloaded; nothing here is shared with what reads them."""

import gzip
import io
import struct

import numpy as np
from PIL import Image


def python2_pickle(value) -> bytes:
    """A pickle of protocol 2 as Python 2 wrote it: text and arrays' bytes are its `str`."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value) -> bytes:
    if isinstance(value, bytes):
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
    if isinstance(value, str):
        return _python2(value.encode("latin1"))
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(one) for key, one in value.items()) + b"u"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
    kind = value.dtype.str[1:]
    dtype = (
        b"cnumpy\ndtype\n"
        + _python2(kind)
        + b"K\0K\1\x87R(K\3"
        + _python2(value.dtype.str[0])
        + b"NNN"
        + 2 * _python2(-1)
        + b"K\0tb"
    )
    shape = b"(" + b"".join(map(_python2, value.shape)) + b"t"
    return made + b"(K\1" + shape + dtype + b"\x89" + _python2(value.tobytes()) + b"tb"


CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def batch(rng, count, most=10, **extra):
    """Pixels and labels of a file of CIFAR's."""
    pixels = rng.integers(0, 256, (count, 3072), np.uint8)
    return {"batch_label": "batch", "data": pixels, "labels": rng.integers(0, most, count).tolist(), **extra}


def cifar10(folder, rng):
    """`cifar-10-batches-py` of 12 test images and 5 times 3 training images."""
    root = folder / "cifar-10-batches-py"
    root.mkdir(parents=True)
    (root / "test_batch").write_bytes(python2_pickle(batch(rng, 12)))
    for number in range(1, 6):
        (root / f"data_batch_{number}").write_bytes(python2_pickle(batch(rng, 3)))
    meta = {"num_cases_per_batch": 10000, "label_names": CIFAR10_NAMES, "num_vis": 3072}
    (root / "batches.meta").write_bytes(python2_pickle(meta))
    return root


def cifar100(folder, rng):
    """`cifar-100-python` of 12 test images and 7 training images."""
    root = folder / "cifar-100-python"
    root.mkdir(parents=True)
    for name, count in (("test", 12), ("train", 7)):
        content = batch(rng, count, 100, coarse_labels=rng.integers(0, 20, count).tolist())
        content["fine_labels"] = content.pop("labels")
        (root / name).write_bytes(python2_pickle(content))
    meta = {"fine_label_names": [f"fine{label}" for label in range(100)], "coarse_label_names": ["coarse"] * 20}
    (root / "meta").write_bytes(python2_pickle(meta))
    return root


def idx(array) -> bytes:
    """An idx file of bytes."""
    return struct.pack(">4B", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(folder, rng, packed=False, name="MNIST"):
    """`MNIST/raw` of 6 test images and 4 training images."""
    root = folder / name / "raw"
    root.mkdir(parents=True)
    for prefix, count in (("t10k", 6), ("train", 4)):
        arrays = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count).astype(np.uint8)
        for array, kind in zip(arrays, ("images-idx3", "labels-idx1"), strict=True):
            content = idx(array)
            (root / f"{prefix}-{kind}-ubyte").write_bytes(content)
            if packed:
                (root / f"{prefix}-{kind}-ubyte").unlink()
                (root / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    return root


def picture(rng, size=(32, 32)):
    return Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))


GTSRB_HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"


def gtsrb(folder, rng, training="Final_Training/Images", table="GTSRB/Final_Test/GT-final_test.csv", classes=4):
    """`GTSRB` of two training images a class, with their tables, and 6 test images."""
    root, listed = folder / "GTSRB", [GTSRB_HEADER]
    for label in range(classes):
        place = root / training / f"{label:05d}"
        place.mkdir(parents=True)
        rows = [GTSRB_HEADER]
        for index in range(2):
            picture(rng, (30 + index, 29)).save(place / f"00000_0000{index}.ppm")
            rows.append(f"00000_0000{index}.ppm;29;{30 + index};5;6;24;25;{label}")
        (place / f"GT-{label:05d}.csv").write_text("\n".join(rows))
    test = root / "Final_Test" / "Images"
    test.mkdir(parents=True)
    for index, label in enumerate([3, 0, 2, 2, 1, 3][: classes + 2]):
        picture(rng, (40, 41)).save(test / f"{index:05d}.ppm")
        listed.append(f"{index:05d}.ppm;41;40;5;6;24;25;{label}")
    (test / "GT-final_test.test.csv").write_text("Filename;Width;Height\n00000.ppm;41;40\n")
    (folder / table).write_text("\n".join(listed) + "\n")
    return root


def tiny_imagenet(folder, rng):
    """`tiny-imagenet-200` of three classes, whose order in `wnids.txt` is not that of text, and 5 validation images."""
    root, numbers = folder / "tiny-imagenet-200", ["n02124075", "n04067472", "n01443537"]
    for number in numbers:
        (root / "train" / number / "images").mkdir(parents=True)
        for index in range(2):
            picture(rng, (64, 64)).save(root / "train" / number / "images" / f"{number}_{index}.JPEG")
        (root / "train" / number / f"{number}_boxes.txt").write_text(f"{number}_0.JPEG\t0\t0\t62\t62\n")
    (root / "val" / "images").mkdir(parents=True)
    rows = []
    for index, number in enumerate([numbers[place] for place in (2, 0, 1, 1, 2)]):
        picture(rng, (64, 64)).save(root / "val" / "images" / f"val_{index}.JPEG")
        rows.append(f"val_{index}.JPEG\t{number}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    (root / "test" / "images").mkdir(parents=True)
    picture(rng, (64, 64)).save(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(numbers) + "\n")
    (root / "words.txt").write_text(
        "n02124075\tEgyptian cat\nn04067472\treel\nn01443537\tgoldfish, Carassius auratus\nn00001740\tentity\n"
    )
    return root


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
