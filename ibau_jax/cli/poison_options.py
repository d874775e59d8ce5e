"""Options of scripts/poison.py."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from ibau_jax.cli.options import SIZE, ClassOrder, DeviceOptions, Normalize, option
from ibau_jax.config import Precision, TrainConfig
from ibau_jax.image_size import ImageSize


@dataclass(frozen=True)
class PoisonOptions(ClassOrder):
    """Trains an image classifier with a backdoor, or a clean one (--attack none), to try audits and defences on.

    python scripts/poison.py --dataset train.npz --test test.npz --attack badnets --target-label 8 --out runs/badnets

    Writes model.pth, which PyTorch and every script here load, and triggers.npz, which they find beside it.
    """

    dataset: Annotated[str, tyro.conf.arg(metavar="SPEC")]
    """images to train on, in the forms that --dataset of scripts/unlearn.py has: digits:train, tfds:NAME:train,
    FILE.npz, FILE.h5, FILE.parquet, a folder of class folders, or a folder:train of CIFAR, MNIST, GTSRB ... as
    downloaded"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """folder for model.pth, triggers.npz, triggers.png and result.json"""
    device: DeviceOptions
    test: Annotated[str | None, option("SPEC", "a tenth of --dataset, which then does not train")] = None
    """images to evaluate on"""
    model: str = "small_vgg"
    """architecture, or your own Flax module, FILE.py:CLASS, as --model of scripts/unlearn.py takes it"""
    image_size: Annotated[ImageSize | None, option("N|HEIGHTxWIDTH", "the architecture's usual size"), SIZE] = None
    """height and width of its images, such as 32 or 96x160; those of a folder or of TFDS are resized"""
    attack: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("badnets",)
    """none, or one or several of: badnets, badnets_all2all, trojan_sq, trojan_wm, l2_inv, l0_inv, blended, sig, smooth,
    wanet, bpp, input_aware, each with parameters if need be (badnets:size=3,row=1,column=1,look=chequered;
    docs/attacks.md has all); a PNG file, which is added to the image; a triggers.npz"""
    target_label: Annotated[tuple[int, ...], option("CLASS [CLASS ...]", "none", "--target")] = ()
    """the class that each attack aims at; none for all-to-all"""
    trigger_dir: Annotated[Path | None, option("DIR", "triggers/ here")] = None
    """folder of the published trigger files"""
    ratio: float = 0.1
    """share of the images that get a trigger"""
    clean_label: bool = False
    """poison images of the target class, which keep their label"""
    decoys: float = 2.0
    """images with almost that trigger, or with another image's, and their own label, for each poisoned one (wanet, bpp
    and input_aware only)"""
    epochs: int = 12
    """passes over the images"""
    batch_size: int = 128
    """images in a step"""
    lr: float = 0.1
    """the largest learning rate"""
    weight_decay: float = 5e-4
    """of kernels"""
    crop: int = 4
    """pixels by which images may move"""
    flip: bool = False
    """whether they may be mirrored"""
    normalize: Normalize = "none"
    """normalisation before the model, as your training code has it: cifar10, cifar100, gtsrb, imagenet or none"""
    precision: Precision = "float32"
    """float32, tf32 or bfloat16"""
    seed: int = 0
    """seed of everything random"""
    overwrite: bool = False
    """replace what is there"""
    resume: bool = False
    """go on with an interrupted training of the same options"""

    def config(self) -> TrainConfig:
        """How to train.

        Raises:
            ConfigError: a value makes no sense.
        """
        names = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(self)}
        return TrainConfig(**{name: getattr(self, name) for name in names})
