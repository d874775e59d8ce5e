"""How many of other people's classifiers are recognised from names and shapes: `python -m tests.measure_recognition`.

Torchvision's are all that it has. Of timm's hundreds they are a choice: other sizes and families that are often met.
`wanted` are the rows of `cases/wanted_checkpoints.md`, in $IBAU_SHARED: what its author saw in files of public code is
compared with the checkpoint that is made here, too. Nothing is computed: test_architectures.py, test_timm.py and
test_wanted.py compare logits.
"""

import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ibau_jax import load
from ibau_jax.errors import CheckpointError
from tests.oracles import torchvision_models
from tests.wanted_rows import tables, wanted_rows

CLASSES = 10
TIMM = [
    "cait_s24_224",
    "cait_xxs24_224",
    "convnext_atto",
    "convnext_tiny",
    "convnext_small",
    "convnextv2_atto",
    "convnextv2_tiny",
    "deit_small_distilled_patch16_224",
    "deit_small_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "densenet121",
    "dla34",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnetv2_rw_s",
    "efficientnetv2_s",
    "tf_efficientnet_b0",
    "tf_efficientnet_b5",
    "tf_efficientnet_b7",
    "tf_efficientnet_b8",
    "tf_efficientnet_lite0",
    "tf_efficientnetv2_s",
    "tf_efficientnetv2_m",
    "tf_efficientnetv2_l",
    "ghostnet_100",
    "hardcorenas_a",
    "hrnet_w18",
    "inception_v3",
    "inception_v4",
    "mixer_b16_224",
    "mixer_s32_224",
    "mnasnet_100",
    "mnasnet_050",
    "mnasnet_075",
    "mnasnet_140",
    "semnasnet_100",
    "mobilenetv2_050",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv3_small_100",
    "tf_mobilenetv3_large_100",
    "regnetx_004",
    "regnetx_004_tv",
    "regnetx_032",
    "regnetx_080",
    "regnety_004",
    "regnety_016",
    "regnety_032",
    "regnety_160",
    "repvgg_a0",
    "resmlp_12_224",
    "resnet10t",
    "resnet14t",
    "resnet18",
    "resnet18d",
    "resnet26",
    "resnet26d",
    "resnet34",
    "resnet34d",
    "resnet50",
    "resnet50d",
    "resnet101",
    "resnetaa50",
    "resnetblur50",
    "resnetv2_50",
    "resnext50_32x4d",
    "rexnet_100",
    "seresnet18",
    "seresnet50",
    "seresnext50_32x4d",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "vgg11",
    "vgg16",
    "vgg16_bn",
    "vit_base_patch16_224",
    "vit_base_patch32_224",
    "vit_small_patch16_224",
    "vit_tiny_patch16_224",
    "wide_resnet50_2",
    "xception",
]


def torchvisions() -> Iterator[tuple[str, torch.nn.Module]]:
    """All of torchvision's classifiers; without memory for their weights where they compute nothing as they are made."""
    models = torchvision_models.models
    for name in models.list_models(module=models):
        device = "cpu" if name.startswith(("swin", "regnet", "maxvit")) else "meta"
        with torch.device(device):
            module = models.get_model(name, num_classes=CLASSES)
        yield name, module


def timms() -> Iterator[tuple[str, torch.nn.Module]]:
    """Those of timm's that `TIMM` names."""
    import timm

    for name in TIMM:
        yield name, timm.create_model(name, num_classes=CLASSES)


def zeros(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict, its parameters zeros; buffers are kept where they have values."""
    buffers = {name for name, value in module.named_buffers(remove_duplicate=False) if not value.is_meta}
    return {
        name: value if name in buffers else torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        for name, value in module.state_dict().items()
    }


def recognised(content: Mapping[str, object], folder: Path) -> str | None:
    """What a checkpoint of a state dict, or of more, is recognised as; None where it is not."""
    torch.save(content, folder / "x.pth")
    try:
        checkpoint = load(folder / "x.pth")
    except CheckpointError:
        return None
    others = len(checkpoint.alternatives)
    return checkpoint.architecture.name + (f" (assumed; {others} more have these names and shapes)" if others else "")


def measure_library(library: str, folder: Path) -> None:
    """Prints what each of a library's is recognised as, and how many are."""
    found = {}
    for name, module in LIBRARIES[library]():
        found[name] = recognised(zeros(module), folder)
        print(f"{library} {name}: {found[name] or '-'}", flush=True)
    print(f"{library}: {sum(map(bool, found.values()))} of {len(found)}", flush=True)


def measure_wanted(folder: Path) -> None:
    """Prints what each row is recognised as and where its facts are others here, and how many are."""
    counts: Counter[str] = Counter()
    for row in wanted_rows(tables(Path(os.environ["IBAU_SHARED"]))):
        module = row.module()
        name, differences = None, ["there is no oracle here"]
        if module is not None:
            state = row.spelled(zeros(module))
            name, differences = recognised(row.content(state), folder), row.differences(state)
            counts.update(recognised=bool(name), confirmed=bool(name) and not differences)
        counts.update(rows=1, missing=module is None)
        facts = "; ".join(differences) or "facts agree"
        print(f"{row.source} {row.architecture}: {name or '-'}; {facts}", flush=True)
    print(
        f"wanted: {counts['recognised']} of {counts['rows']} rows recognised; of them {counts['confirmed']} with the "
        f"row's facts confirmed; of {counts['missing']} rows there is no oracle here",
        flush=True,
    )


LIBRARIES = {"torchvision": torchvisions, "timm": timms}


def main() -> None:
    """Measures the sets that are asked for, or all."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        for one in sys.argv[1:] or [*LIBRARIES, "wanted"]:
            if one == "wanted":
                measure_wanted(Path(folder))
            else:
                measure_library(one, Path(folder))


if __name__ == "__main__":
    main()
