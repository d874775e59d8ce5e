"""Trains the models that the audit and unlearning are tried on: clean ones and poisoned ones.

    python -m benchmarks.zoo FOLDER NAME [NAME ...]      # a name of `ZOO`; without any, all of them

Small VGGs on the real data of `../shared` and on handwritten digits, 2 to 9 minutes each on 2 cores; PreActResNet18s,
for which it takes a GPU. Writes FOLDER/NAME.pth and prints ACC and ASR.
"""

import argparse
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.cases import SHARED
from ibau_jax import Attack, Dataset, evaluate, load_dataset, save
from ibau_jax.checkpoints import fresh_checkpoint
from ibau_jax.config import TrainConfig
from ibau_jax.execution import Execution
from ibau_jax.image_size import ImageSize
from ibau_jax.models import get_architecture
from ibau_jax.poisoning import Poison
from ibau_jax.training import train
from ibau_jax.triggers import Canvas, load_attacks, together

SHAPE = (32, 32, 3)
PUBLISHED = re.compile(r"(gtsrb)?(?P<attack>\w+)_(?P<target>\d+)_02_ckpt")
CIFAR_TRAIN = 7000  # of the 10,000 images there are; the others evaluate


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    architecture: str
    classes: int
    config: TrainConfig


def images_of(data: str) -> tuple[Dataset, Dataset]:
    """The images that train models of some data, and those that do not."""
    if data == "gtsrb":
        return (_shared("gtsrb_train_12k.npz"), _shared("gtsrb_test.npz"))
    if data == "digits":
        return (load_dataset("digits:train", SHAPE), load_dataset("digits:test", SHAPE))
    cifar = _shared("cifar10_test.npz")
    return cifar.take(np.arange(CIFAR_TRAIN)), cifar.take(np.arange(CIFAR_TRAIN, len(cifar)))


def _shared(name: str) -> Dataset:
    return load_dataset(str(SHARED / "data" / name), SHAPE)


RECIPES = {
    "cifar": Recipe("small_vgg", 10, TrainConfig(epochs=12, flip=True)),
    "gtsrb": Recipe("small_vgg", 43, TrainConfig(epochs=8, crop=2)),
    "digits": Recipe("small_vgg", 10, TrainConfig(epochs=20, batch_size=50, lr=0.05, crop=1)),
    "cifar-preact_resnet18": Recipe("preact_resnet18", 10, TrainConfig(epochs=40, flip=True)),
    "gtsrb-preact_resnet18": Recipe("preact_resnet18", 43, TrainConfig(epochs=15, crop=2)),
    "gtsrb-wide_resnet16_1": Recipe("wide_resnet16_1", 43, TrainConfig(epochs=15, crop=2)),
}

ATTACKS = {
    "blended": "blended:alpha=0.1,seed=7",
    "sig": "sig",
    "corner": "badnets:size=3,row=1,column=1,look=chequered",
    "trojan_sq": "trojan_sq",
    "wanet": "wanet:seed=3",
    "smooth": "smooth:seed=5",
    "bpp": "bpp",
    "l0_inv": "l0_inv",
    "l2_inv": "l2_inv",
    "all2all": "badnets_all2all",
}

# RECIPE-clean-SEED, RECIPE-ATTACK-TARGET-SEED, with more of ATTACK-TARGET for several in one model, RECIPE-all2all-SEED
PART = re.compile(rf"({'|'.join(ATTACKS)})(?:-(\d+))?")
NAME = re.compile(rf"(?P<recipe>{'|'.join(sorted(RECIPES, key=len, reverse=True))})-(?P<parts>.+)-(?P<seed>\d+)")
ZOO = (
    *(f"{data}-clean-{seed}" for data, count in (("digits", 5), ("cifar", 4), ("gtsrb", 1)) for seed in range(count)),
    "cifar-blended-5-1",
    "cifar-corner-1-2",
    "cifar-trojan_sq-9-3",
    "gtsrb-blended-7-2",
    "gtsrb-corner-3-1",
    "gtsrb-sig-10-3",
    "gtsrb-wanet-4-1",
    "cifar-sig-6-5",
    "cifar-smooth-2-6",
    "cifar-wanet-3-4",
    "gtsrb-bpp-20-5",
    "gtsrb-smooth-5-4",
    "gtsrb-trojan_sq-14-6",
    "cifar-l0_inv-4-7",
    "gtsrb-l2_inv-25-9",
    "cifar-corner-1-smooth-6-3",
    "cifar-sig-0-blended-4-trojan_sq-8-2",
    "cifar-corner-5-sig-7-l0_inv-1-4",
    "cifar-l0_inv-3-blended-8-sig-5-9",
    "gtsrb-blended-7-corner-30-8",
    "cifar-all2all-1",
    "cifar-wanet-7-11",
    "cifar-blended-2-13",
    "gtsrb-wanet-20-12",
    "cifar-sig-2-20",
    "cifar-sig-8-corner-3-l0_inv-6-21",
    "cifar-all2all-22",
    "gtsrb-all2all-23",
    "cifar-preact_resnet18-clean-0",
    "cifar-preact_resnet18-trojan_sq-6-1",
    "gtsrb-preact_resnet18-clean-0",
    "gtsrb-preact_resnet18-blended-12-2",
    "gtsrb-preact_resnet18-corner-2-1",
    "gtsrb-wide_resnet16_1-blended-12-2",
    "gtsrb-wide_resnet16_1-corner-2-1",
)


CLEANED = "-cleaned-"  # NAME-cleaned-KIND-SEED, as `benchmarks.unlearning --save` calls them


def others_of(name: str) -> Dataset:
    """The images that did not train the model of that name: one of `ZOO`, a published one, or the embedded example.

    Some of them unlearned a cleaned one.
    """
    if "digits" in name:
        return images_of("digits")[1]
    if "gtsrb" in name or name.startswith("cifar-"):
        return images_of("gtsrb" if "gtsrb" in name else "cifar")[1]
    return _shared("cifar10_test.npz")


def planned(name: str) -> tuple[list[str], list[int]]:
    """The attacks that a model's name says, and their targets; neither for a clean and for a cleaned one."""
    if name in ZOO:
        parts = PART.findall(named(name)["parts"])
        return [ATTACKS[attack] for attack, _ in parts], [int(target) for _, target in parts if target]
    if match := PUBLISHED.fullmatch(name):
        return [match["attack"]], [int(match["target"])]
    return (["badnets"], [3]) if name == "badnets_digits" else ([], [])


def named(name: str) -> re.Match[str]:
    """What a name of `ZOO` says."""
    match = NAME.fullmatch(name)
    if name not in ZOO or not match:
        raise SystemExit(f"{name} is none of {', '.join(ZOO)}")
    return match


def targets_of(name: str) -> tuple[int, ...]:
    """The targets of that model: none of a clean and of a cleaned one, every class of an all-to-all attack."""
    attacks, targets = planned(name)
    all_to_all = attacks and not targets
    return tuple(range(RECIPES[named(name)["recipe"]].classes) if all_to_all else targets)


def attack_of(name: str) -> Attack | None:
    """All that was planted in that model, as one attack with its target; None for a clean and for a cleaned one."""
    attacks, targets = planned(name)
    return together(load_attacks(attacks, targets, Canvas(SHAPE, [SHARED / "triggers"]))) if attacks else None


def ratio_of(attack: Attack) -> float:
    """The share of the images that is poisoned: a tenth of 7000 teach an all-to-all attack to a quarter of images."""
    return 0.3 if attack.all_to_all else 0.1


def make(name: str, folder: Path) -> str:
    """Trains a model, writes it, and says how it does."""
    match, start = named(name), time.perf_counter()
    recipe, (training, others) = RECIPES[match["recipe"]], images_of(match["recipe"].partition("-")[0])
    attack = attack_of(name)
    poison = Poison(attack.parts(recipe.classes), ratio_of(attack)) if attack else None
    config, architecture = replace(recipe.config, seed=int(match["seed"])), get_architecture(recipe.architecture)
    model = train(
        architecture, recipe.classes, training, config, poison=poison, execution=Execution(precision="tf32")
    ).model
    metrics = evaluate(model, others.first(3000), attack)
    save(fresh_checkpoint(architecture, recipe.classes, ImageSize(*SHAPE[:2]), model, {}), folder / f"{name}.pth")
    asr = "" if metrics.asr is None else f"  ASR {100 * metrics.asr:.1f} %"
    return f"{name}  ACC {100 * metrics.acc:.1f} %{asr}  {time.perf_counter() - start:.0f} s"


def main() -> None:
    """Trains what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=ZOO)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        print(make(name, options.folder), flush=True)


if __name__ == "__main__":
    main()
