"""Groups of command-line options, in tyro's form. Field docstrings are the help texts."""

import glob
import itertools
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from ibau_jax.config import (
    PRESETS,
    AuditConfig,
    Mirror,
    RelearnConfig,
    Schedule,
    Solver,
    Space,
    UnlearnConfig,
    suited,
)
from ibau_jax.errors import ConfigError
from ibau_jax.execution import Precision

if TYPE_CHECKING:
    from ibau_jax.defences import TuneConfig

Parsed = TypeVar("Parsed")
Tuning = TypeVar("Tuning", bound="TuneConfig")


def parse(kind: type[Parsed]) -> Parsed:
    """The command line as `kind`, the names of groups left out of the options' names."""
    form: Any = Annotated[kind, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff]
    options: Parsed = tyro.cli(form)
    return options


def option(metavar: str, default: str, *aliases: str) -> Any:
    """How an option without a fixed default shows in --help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})", aliases=list(aliases))


Model = Annotated[str | None, option("NAME|FILE.py:CLASS", "recognised from names and shapes")]
NumClasses = Annotated[int | None, option("N", "recognised from shapes")]
ImageSize = Annotated[int | None, option("N", "what the checkpoint says, else the architecture's usual size")]
Key = Annotated[str | None, option("KEY", "net, model, state_dict, ... or the only one")]
Normalize = Literal["cifar10", "cifar100", "gtsrb", "imagenet", "none"]


@dataclass(frozen=True)
class OneCheckpoint:
    """A file."""

    ckpt: Annotated[Path, tyro.conf.arg(metavar="FILE", aliases=["--poi-path"])]
    """PyTorch checkpoint, whatever it is called, or Flax folder; read without torch, nothing in it is executed"""


@dataclass(frozen=True)
class ManyCheckpoints:
    """Files."""

    ckpt: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]", aliases=["--poi-path"])]
    """PyTorch checkpoints, whatever they are called, Flax folders, or patterns such as 'runs/*/model.pth'; read without
    torch, nothing in them is executed. Those of one architecture unlearn together"""


@dataclass(frozen=True)
class ModelChoices:
    """What a checkpoint does not say of its classifier."""

    model: Model = None
    """architecture, or your own Flax module (that file is run; see docs/custom_model.md)"""
    num_classes: NumClasses = None
    """number of classes"""
    image_size: ImageSize = None
    """height and width of the model's images"""
    key: Key = None
    """where in the file the state dict lies, such as model_ema"""
    normalize: Annotated[Normalize | None, option("NAME", "what the checkpoint implies, else none")] = None
    """normalisation of the model's images: cifar10, cifar100, gtsrb, imagenet or none"""
    mean: Annotated[tuple[float, ...] | None, option("X X X", "that of --normalize")] = None
    """mean that the model's images are normalised with, one number a channel (such as 0.49 0.48 0.45)"""
    std: Annotated[tuple[float, ...] | None, option("X X X", "that of --normalize")] = None
    """standard deviation, likewise"""


@dataclass(frozen=True)
class ModelOptions(ModelChoices, OneCheckpoint):
    """The classifier."""


@dataclass(frozen=True)
class ModelsOptions(ModelChoices, ManyCheckpoints):
    """The classifiers."""

    def each(self) -> list[ModelOptions]:
        """The options of every checkpoint; patterns are expanded, in the order of their names.

        Raises:
            ConfigError: a pattern fits no file, or no checkpoint is named.
        """
        choices = {field.name: getattr(self, field.name) for field in fields(ModelChoices)}
        paths = [path for pattern in self.ckpt for path in _expanded(pattern)]
        if not paths:
            raise ConfigError("--ckpt names no checkpoint")
        return [ModelOptions(ckpt=path, **choices) for path in dict.fromkeys(paths)]


def _expanded(pattern: Path) -> list[Path]:
    if pattern.exists() or not any(character in str(pattern) for character in "*?["):
        return [pattern]
    found = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    if not found:
        raise ConfigError(f"--ckpt: no file is called {pattern}")
    return found


@dataclass(frozen=True)
class DataOptions:
    """The clean images."""

    dataset: Annotated[str | None, option("SPEC", "what the checkpoint names")] = None
    """digits, tfds:NAME[/CONFIG][:SPLIT], FILE.npz (x, y), FILE.h5 (X_test, Y_test) or a folder of class folders"""
    clean_set: Annotated[str | None, option("SPEC", "a part of --dataset", "--unl-set")] = None
    """images to unlearn with, in the same forms; the rest of --dataset evaluates where it is not given"""
    n_clean: Annotated[int | None, option("N", "5000 or half of --dataset, all of --clean-set")] = None
    """how many images unlearn; half of --dataset where it has fewer than 10,000"""


@dataclass(frozen=True)
class AttackOptions:
    """The attack to measure. It plays no part in unlearning."""

    attack: Annotated[str | None, option("NAME|PNG|folder:PATH", "what the checkpoint names, else none")] = None
    """badnets, badnets_all2all, trojan_sq, trojan_wm, l0_inv, l2_inv, blended, sig, smooth, wanet, bpp, with parameters
    if need be (badnets:size=3,row=1,column=1; see docs/attacks.md), a PNG file that is added to the image, a
    triggers.npz of scripts/poison.py, or a folder of triggered test images, PATH/TRUE_CLASS/INDEX.png, as
    BackdoorBench's bd_test_dataset"""
    target_label: Annotated[int | None, option("CLASS", "what the checkpoint names", "--target")] = None
    """class that the attack aims at"""
    trigger_dir: Annotated[Path | None, option("DIR", "triggers/ here or beside the checkpoint's folder")] = None
    """folder of the published trigger files"""
    trigger_mask: Annotated[Path | None, option("FILE", "none")] = None
    """mask (.npy or image) of an --attack PNG: x·(1 − mask) + PNG instead of x + PNG"""


@dataclass(frozen=True)
class MethodOptions:
    """I-BAU, or another method. What is not given is as the preset, or the other method's paper, has it."""

    method: Literal["ibau", "ft", "ft-sam", "fp", "nc", "nad", "anp", "sau"] = "ibau"
    """ibau, or another defence to compare with (docs/defences.md), which takes --epochs, --batch-size, --lr, --crop and
    --seed of the options here, and no preset"""
    epochs: Annotated[int | None, option("N", "100")] = None
    """passes over the clean images, of another method than ibau"""
    preset: Literal["robust", "robust-few", "cifar10", "gtsrb", "backdoorbench", "backdoor-toolbox"] = "robust"
    """robust: what cleans best (docs/experiments.md), with a short audit that says which class to suspect, and
    robust-few below 1000 clean images; or the published command line's settings (cifar10), the published GTSRB
    notebook's (gtsrb), or those of BackdoorBench and backdoor-toolbox (docs/presets.md has all in a table)"""
    n_rounds: Annotated[int | None, option("N", "robust, -toolbox 3, robust-few, gtsrb 1, others 5")] = None
    """rounds"""
    batch_size: Annotated[int | None, option("N", "backdoorbench 256, others 100")] = None
    """clean images in a batch"""
    K: Annotated[int | None, option("N", "robust 1, published 5")] = None
    """terms of the Neumann series, or iterations of another --solver"""
    optim: Annotated[str | None, option("NAME", "backdoorbench amsgrad, others adam")] = None
    """optimiser of the weights: adam, sgd or any optax optimiser"""
    lr: Annotated[tuple[float, ...] | None, option("X [X ...]", "0.001 (-few 8e-4, -bench 1e-4, -toolbox 5e-4)")] = None
    """its learning rate; each of several is tried"""
    inner_optim: Annotated[str | None, option("NAME", "gtsrb adam, others sgd")] = None
    """optimiser of the perturbation"""
    inner_lr: Annotated[float | None, option("X", "gtsrb 1, others 10")] = None
    """its learning rate"""
    norm_bound: Annotated[float | None, option("X", "gtsrb 10, others none")] = None
    """radius of the l2 ball that the perturbation is projected onto"""
    clip: Annotated[bool | None, option("True|False", "gtsrb True, others False")] = None
    """clip perturbed images to [0, 1]"""
    space: Annotated[Space | None, option("pixel|normalized", "backdoor... normalized, others pixel")] = None
    """what the perturbation is added to: images in [0, 1], or images after --normalize"""
    shuffle: Annotated[bool | None, option("True|False", "backdoor... True, others False")] = None
    """find the perturbation on the images in a new order in each round"""
    portion: Annotated[float | None, option("X", "robust 0.2, published 0.01")] = None
    """share of each batch that is perturbed"""
    min_batches: Annotated[int | None, option("N", "robust 20, robust-few 40, published 1")] = None
    """a round goes through the clean batches as often as it takes to have so many"""
    schedule: Annotated[Schedule | None, option("constant|cosine", "robust cosine, published constant")] = None
    """learning rate over the rounds"""
    distillation: Annotated[float | None, option("X", "robust 1, robust-few 5, published 0")] = None
    """weight of the divergence from what the model as it came says of clean images"""
    crop: Annotated[int | None, option("N", "robust 2, backdoorbench 4, others 0")] = None
    """pixels by which the images that unlearn may move, anew in each round"""
    mix: Annotated[float | None, option("X", "robust-few 0.5, others 0")] = None
    """share of another image that is mixed into each of them, at most"""
    mirror: Annotated[Mirror | None, option("never|tolerated|always", "robust, -bench tolerated, others never")] = None
    """whether they may be mirrored; tolerated: where the model as it came classifies mirrored ones as well"""
    perturbations: Annotated[int | None, option("N", "robust 2, robust-few 4, published 1")] = None
    """perturbations in a round, each on its share of a batch"""
    targeted: Annotated[bool | None, option("True|False", "robust True, published False")] = None
    """whether they lead to suspected targets, instead of away from the labels"""
    untargeted_rounds: Annotated[int | None, option("N", "robust 1, published 0")] = None
    """rounds with untargeted perturbations before those with --targeted ones"""
    untargeted_max_ratio: Annotated[float | None, option("X", "robust 5, published none")] = None
    """none of them where a suspect stands out more: the median class's smallest perturbation is so many times its"""
    untargeted_reach: Annotated[float | None, option("X", "robust 15, robust-few 10, published none")] = None
    """norm of an untargeted perturbation, at most, in units of the smallest one that leads to the suspect"""
    suspects: Annotated[int | None, option("N", "1")] = None
    """classes that are suspected: those reached by the smallest perturbations"""
    reach: Annotated[tuple[float, float] | None, option("X X", "robust 2 16")] = None
    """norms of targeted perturbations, from and to, in units of the smallest one that leads to the class"""
    regularization: Annotated[float | None, option("X", "robust 0, published 0.001")] = None
    """weight of the perturbation's squared norm"""
    held_out: Annotated[float | None, option("X", "robust 0.1, others 0")] = None
    """share of the clean images that do not unlearn, but tell which rounds to keep"""
    folds: Annotated[int | None, option("N", "robust-few 3, others 1")] = None
    """instead of --held-out: rehearse the run N times, each without a part of the clean images, which then measures"""
    min_rounds: Annotated[int | None, option("N", "robust 2, others 1")] = None
    """rounds before it may stop"""
    closed: Annotated[float | None, option("X", "0.005")] = None
    """with --held-out or --folds: stop after a round that leaves no larger a share of images following short cuts"""
    max_acc_drop: Annotated[float | None, option("X", "0.05")] = None
    """with those: a round that leaves accuracy lower than at first by more than this share is taken back"""
    solver: Annotated[Solver | None, option("neumann|cg|normal_cg|gmres|bicgstab", "neumann")] = None
    """linear solver of the hypergradient"""
    fixed_point_step: Annotated[float | None, option("X", "robust 0.001, published 0.1")] = None
    """step size of the inner gradient step in the hypergradient"""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (2,)
    """seed of the clean set's choice and of the images perturbed or held out; each of several is tried"""

    def configs(self) -> list[UnlearnConfig]:
        """The preset with what was given on the command line, for each seed and learning rate.

        Raises:
            ConfigError: a value makes no sense.
        """
        sweeps = itertools.product(dict.fromkeys(self.seed), dict.fromkeys(self.lr or (None,)))
        if self.method == "ibau" and self.epochs is not None:
            raise ConfigError("--epochs is of other methods; ibau has rounds (--n-rounds)")
        configs = [self._config(self.preset, seed, lr) for seed, lr in sweeps]
        if not configs:
            raise ConfigError("--seed names no seed")
        return configs

    def suited(self, config: UnlearnConfig, n_clean: int) -> tuple[str, UnlearnConfig]:
        """The preset that holds for so many clean images, and one of `configs` with that preset."""
        preset = suited(self.preset, n_clean)
        return preset, self._config(preset, config.seed, config.lr if self.lr else None)

    def tuning(self, kind: type[Tuning], config: UnlearnConfig) -> Tuning:
        """The constants of another method than ibau, with what was given, and the seed of one of `configs`.

        Raises:
            ConfigError: something was given that it does not take, or makes no sense.
        """
        names = {field.name for field in fields(self)} - {"method", "preset", "seed", "lr"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name in given.keys() - {"epochs", "batch_size", "crop"}:
            raise ConfigError(f"--{name.replace('_', '-')} says nothing to --method {self.method}; see --help")
        epochs = given.pop("epochs", None)
        given |= {"seed": config.seed} | ({"lr": config.lr} if self.lr else {})
        found = kind(**given)
        return found if epochs is None else found.shortened(epochs)

    def _config(self, preset: str, seed: int, lr: float | None) -> UnlearnConfig:
        given = {field.name: getattr(self, field.name, None) for field in fields(UnlearnConfig)}
        given |= {"seed": seed, "lr": lr}
        return replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class AuditOptions:
    """The audit. What is not given is as chosen on the models of docs/experiments.md."""

    audit_steps: Annotated[int | None, option("N", "100")] = None
    """steps of the search for each class's smallest trigger"""
    audit_success: Annotated[float | None, option("X", "0.9")] = None
    """share of other classes' images that a trigger must take to its class"""
    audit_images: Annotated[int | None, option("N", "500 and 200")] = None
    """clean images to search on, at most, and others to measure on"""
    audit_seed: int = 0
    """seed of the order of images and of the first triggers"""

    def config(self) -> AuditConfig:
        """The audit's constants.

        Raises:
            ConfigError: a value makes no sense.
        """
        given: dict[str, Any] = {
            "steps": self.audit_steps,
            "success": self.audit_success,
            "search_images": self.audit_images,
            "held_out_images": self.audit_images,
        }
        return AuditConfig(seed=self.audit_seed, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class BeforeAfterOptions(AuditOptions):
    """The audit of the model as it came and of the cleaned one, without the trigger: what scripts/audit.py does."""

    audit: bool = True
    """do not audit"""


@dataclass(frozen=True)
class RelearnOptions:
    """How fast the backdoor comes back: the cleaned model, the one that came and a clean one fine-tuned alike."""

    relearn: Annotated[int | None, option("N", "no check")] = None
    """fine-tune on the clean images and N of them with the trigger, and watch the attack's success"""
    relearn_epochs: Annotated[int | None, option("N", "5")] = None
    """for how many epochs"""
    clean_ckpt: Annotated[Path | None, option("FILE", "trained on the clean images, if there are 1000")] = None
    """a checkpoint of the same architecture that never had the backdoor, to compare with"""

    def config(self, seed: int) -> RelearnConfig:
        """The check's constants.

        Raises:
            ConfigError: a value makes no sense.
        """
        given = {"triggered": self.relearn, "epochs": self.relearn_epochs}
        return RelearnConfig(seed=seed, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class OutputOptions:
    """Where results go."""

    out: Annotated[Path | None, option("DIR", "runs/NAME", "--log-path")] = None
    """folder for report.html, result.json, the cleaned model, flax/ and perturbation.png; of several runs, the folder
    of theirs"""
    overwrite: bool = False
    """replace the results that are there"""
    resume: bool = False
    """go on with an interrupted run of the same options"""


@dataclass(frozen=True)
class DeviceOptions:
    """Where it runs."""

    device: str = "auto"
    """auto, cpu, cuda, tpu, or a CUDA device: cuda:1, or numbers such as 0 or 4,5"""
    compile_cache: bool = True
    """do not keep compiled programs in $XDG_CACHE_HOME/ibau_jax (~/.cache/ibau_jax) for later runs"""


@dataclass(frozen=True)
class ExecutionOptions:
    """How it computes: speed, memory, many devices."""

    precision: Precision = "float32"
    """float32; tf32: products in TensorFloat-32 where the device has it; bfloat16: the model computes in bfloat16"""
    microbatch: Annotated[int | None, option("N", "the whole batch")] = None
    """images that go through the model at a time, to spare memory"""
    remat: bool = False
    """compute the linearised model anew for every term of the series, to spare memory"""
    devices: int = 1
    """devices that share the work: checkpoints (seeds, learning rates) first, then the images of a batch"""
    shard_params: bool = False
    """spread weights and optimiser state over the devices, for models too large for one"""
    coordinator: Annotated[str | None, option("HOST:PORT|auto", "one process")] = None
    """where several processes, started with the same command on every host, meet: the first one's address, or auto
    under SLURM and on TPU pods. All see the same files; the first one writes"""
    num_processes: Annotated[int | None, option("N", "what the cluster says")] = None
    """number of processes, with --coordinator HOST:PORT"""
    process_id: Annotated[int | None, option("N", "what the cluster says")] = None
    """number of this process, from 0"""


@dataclass(frozen=True)
class UnlearnOptions:
    """Unlearns a backdoor from a PyTorch image classifier with I-BAU (Zeng et al., ICLR 2022).

    python scripts/unlearn.py --ckpt suspicious.pth --dataset clean.npz --attack badnets --target-label 8

    python scripts/unlearn.py --ckpt models/*.pth --dataset clean.npz --seed 0 1 2

    The published command line's spellings work too: --poi_path, --unl_set, --n_rounds, --batch_size, --log_path.
    """

    subject: ModelsOptions
    data: DataOptions
    attack: AttackOptions
    method: MethodOptions
    audit: BeforeAfterOptions
    relearning: RelearnOptions
    output: OutputOptions
    device: DeviceOptions
    execution: ExecutionOptions
