"""Groups of command-line options, in tyro's form. Field docstrings are the help texts."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, cast

import docstring_parser
import tyro

from ibau_jax.config import AuditConfig, Precision, RelearnConfig
from ibau_jax.errors import ConfigError
from ibau_jax.image_size import ImageSize

Parsed = TypeVar("Parsed")


def parse(kind: type[Parsed], arguments: Sequence[str] | None = None) -> Parsed:
    """The command line, or `arguments`, as `kind`, the names of groups left out of the options' names."""
    _join_lines(kind)
    form: Any = Annotated[kind, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff]
    options: Parsed = tyro.cli(form, args=arguments)
    return options


def _join_lines(kind: type) -> None:
    """Makes each help text one line, to be wrapped anew: tyro keeps the breaks of indented field docstrings.

    It takes what stands under `help` in a field's metadata first.
    """
    documented = [docstring_parser.parse_from_object(base).params for base in kind.__mro__ if is_dataclass(base)]
    texts = {param.arg_name: param.description for params in reversed(documented) for param in params}
    for one in fields(kind):
        if text := texts.get(one.name):
            one.metadata = MappingProxyType({**one.metadata, "help": " ".join(text.split())})
        if is_dataclass(one.type):
            _join_lines(cast(type, one.type))


def option(metavar: str, default: str, *aliases: str) -> Any:
    """How an option without a fixed default shows in --help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})", aliases=list(aliases))


# How tyro reads and shows an image's size.
SIZE: Any = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="N|HEIGHTxWIDTH",
    instance_from_str=lambda texts: ImageSize.parsed(texts[0]),
    is_instance=lambda value: value is None or isinstance(value, ImageSize),
    str_from_instance=lambda size: [str(size)],
)
On = Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: on)")]  # shows as --no-NAME, with what that does
Model = Annotated[str | None, option("NAME|FILE.py:CLASS", "recognised from names and shapes")]
NumClasses = Annotated[int | None, option("N", "recognised from shapes")]
OptionalSize = Annotated[
    ImageSize | None,
    option("N|HEIGHTxWIDTH", "what the checkpoint says, else the architecture's usual size"),
    SIZE,
]
Key = Annotated[str | None, option("KEY", "net, model, state_dict, ... or the only one")]
LeaveOut = Annotated[tuple[str, ...], option("NAME [NAME ...]", "none")]
Normalize = Literal["cifar10", "cifar100", "gtsrb", "imagenet", "none"]


@dataclass(frozen=True)
class OneCheckpoint:
    """A file."""

    ckpt: Annotated[Path, tyro.conf.arg(metavar="FILE", aliases=["--poi-path"])]
    """PyTorch checkpoint, whatever it is called, Flax folder, transformers' folder or hf:ORG/NAME of the Hugging Face
    hub; read without torch, nothing in it is executed"""

    def __post_init__(self) -> None:
        """Downloads what lies on the hub. Imported only then: --help and a wrong option need not wait for JAX."""
        if str(self.ckpt).startswith("hf:") and not self.ckpt.exists():
            from ibau_jax.checkpoints.hub import downloaded

            object.__setattr__(self, "ckpt", downloaded(str(self.ckpt)))


@dataclass(frozen=True)
class ManyCheckpoints:
    """Files."""

    ckpt: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]", aliases=["--poi-path"])]
    """PyTorch checkpoints, whatever they are called, Flax folders, transformers' folders, hf:ORG/NAME of the Hugging
    Face hub, or patterns such as 'runs/*/model.pth'; read without torch, nothing in them is executed. Those of one
    architecture unlearn together"""


@dataclass(frozen=True)
class ModelChoices:
    """What a checkpoint does not say of its classifier."""

    model: Model = None
    """architecture, or your own Flax module (that file is run; see docs/custom_model.md)"""
    num_classes: NumClasses = None
    """number of classes"""
    image_size: OptionalSize = None
    """height and width of the model's images, such as 32 or 96x160"""
    key: Key = None
    """where in the file the state dict lies, such as model_ema, or one of its networks, such as state_dict.student"""
    leave_out: LeaveOut = ()
    """tensors of the state dict that take no part in what the network computes, or what their names begin with; they
    are kept as they are"""
    normalize: Annotated[Normalize | None, option("NAME", "what the checkpoint implies, else none")] = None
    """normalisation of the model's images: cifar10, cifar100, gtsrb, imagenet or none"""
    mean: Annotated[tuple[float, ...] | None, option("X X X", "that of --normalize")] = None
    """mean that the model's images are normalised with, one number a channel (such as 0.49 0.48 0.45)"""
    std: Annotated[tuple[float, ...] | None, option("X X X", "that of --normalize")] = None
    """standard deviation, likewise"""
    force: bool = False
    """go on, with a warning, where clean images do not fit the original model: it classifies them near chance, another
    order of labels or another normalisation explains them far better, or its BatchNorm statistics are of another
    network"""


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
        choices = {one.name: getattr(self, one.name) for one in fields(ModelChoices)}
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
class ClassOrder:
    """Which label a class folder has."""

    class_order: Annotated[str | None, option("number|text|FILE", "number for numbers, text for other names")] = field(
        default=None, kw_only=True
    )
    """labels of a folder's class folders: number: the numbers in their names; text: their places in the order of text,
    as torchvision's ImageFolder has it, also where they are numbers; or a file with all names, one a line in the order
    of labels, or class_to_idx as JSON"""


@dataclass(frozen=True)
class DataOptions(ClassOrder):
    """The clean images."""

    dataset: Annotated[str | None, option("SPEC", "what the checkpoint names")] = None
    """digits; tfds:NAME[/CONFIG][:SPLIT]; FILE.npz or FILE.h5, [:SPLIT] or [:IMAGES,LABELS] (by default test, or x and
    y); FILE.parquet; a folder of class folders; or a folder[:SPLIT] of CIFAR, MNIST, GTSRB, Tiny ImageNet, parquet
    files, or of train/, val/ and test/ with class folders, as downloaded"""
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
class AuditOptions:
    """The audit. The defaults were chosen on four models (benchmarks/NOTEBOOK.md)."""

    audit_steps: Annotated[int | None, option("N", "51")] = None
    """steps of the search for the smallest triggers; classes that can't decide the audit do a third of them"""
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

    audit: On = True
    """do not audit the model before and after"""


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
    compile_cache: On = True
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
