"""What timm and Microsoft call the layers of networks that torchvision has, too: patterns, and torchvision's names.

timm numbers blocks within their stage, torchvision mostly in one list. Layers that a network here has under timm's own
name are left out: what it computes is then known from that name.
"""

import re
from collections.abc import Callable, Iterable

Names = dict[str, str | Callable[[re.Match[str]], str]]

LEAF = r"\.(?P<leaf>.+)"
MOST_STAGES = 6  # of a Swin transformer or ConvNeXt; published ones have four
EFFICIENTNET_STAGES = range(7)
V2_FUSED_STAGES = range(1, 3)  # of EfficientNetV2, behind a stage of single convolutions
REPVGG_STAGES = 4
V2_BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # of MobileNetV2's stages
# Blocks of MobileNetV3's stages, and which of them squeeze.
V3_LARGE, V3_SMALL = ((1, 2, 3, 4, 2, 3), (2, 4, 5)), ((1, 2, 3, 2, 3), (0, 2, 3, 4))
MNASNET_STAGES = 7
CONV_NORM = (("conv", "0"), ("bn", "1"))  # a convolution and its BatchNorm
MOBILE_STEM: Names = {rf"conv_stem{LEAF}": r"features.0.0.\g<leaf>", rf"bn1{LEAF}": r"features.0.1.\g<leaf>"}


def _layers(outer: str, own_outer: str, layers: dict[str, str]) -> Names:
    """Whole layers of a module, all of their tensors."""
    return {rf"{outer}{re.escape(name)}{LEAF}": rf"{own_outer}{own}.\g<leaf>" for name, own in layers.items()}


def swin(merges_after: int) -> Names:
    """A Swin transformer's.

    Args:
        merges_after: the number of the stage that has what merges the patches behind stage 0.
    """
    names = _layers("patch_embed[.]", "features.0.", {"proj": "0", "norm": "2"})
    for stage in range(MOST_STAGES):
        block, own = rf"layers[.]{stage}[.]blocks[.](\d+)[.]", rf"features.{2 * stage + 1}.\1."
        names |= _layers(block, own, {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"})
        names[rf"{block}(?P<leaf>.+)"] = rf"{own}\g<leaf>"
        names |= _layers(rf"layers[.]{stage - merges_after}[.]", "features.", {"downsample": f"{2 * stage + 2}"})
    return names


CONVNEXT_BLOCK = {"conv_dw": "0", "norm": "2", "mlp.fc1": "3", "mlp.fc2": "5"}
CONVNEXT_V2_BLOCK = {**CONVNEXT_BLOCK, "mlp.grn": "5", "mlp.fc2": "6"}


def convnext(block: dict[str, str]) -> Names:
    """A ConvNeXt's; `gamma` is torchvision's `layer_scale` of another shape.

    Args:
        block: where a block's layers stand in torchvision's `block`.
    """
    names = _layers("", "", {"head.norm": "classifier.0", "head.fc": "classifier.2"})
    names |= _layers("stem[.]", "features.0.", {"0": "0", "1": "1"})
    for stage in range(MOST_STAGES):
        place, own = rf"stages[.]{stage}[.]blocks[.](\d+)[.]", rf"features.{2 * stage + 1}.\1."
        names |= {rf"{place}gamma": rf"{own}layer_scale"} | _layers(place, f"{own}block.", block)
        names |= _layers(rf"stages[.]{stage}[.]", "features.", {"downsample": f"{2 * stage}"})
    return names


def repvgg() -> Names:
    """A RepVGG's by the names of its authors, its branches joined or not."""
    branches = {
        "conv_kxk": "rbr_dense",
        "conv_1x1": "rbr_1x1",
        "identity": "rbr_identity",
        "reparam_conv": "rbr_reparam",
    }
    names = _layers("stem[.]", "stage0.", branches) | _layers("", "", {"head.fc": "linear"})
    for stage in range(REPVGG_STAGES):
        names |= _layers(rf"stages[.]{stage}[.](\d+)[.]", rf"stage{stage + 1}.\1.", branches)
    return names


def _block(place: str, own: str, *, expands: bool, squeezes: bool, nests_last: bool = True) -> Names:
    """A mobile block's: pairs of a convolution and its BatchNorm, and a squeeze-and-excitation before the last.

    Args:
        place: of the block, a pattern.
        own: what torchvision's names of its layers begin with.
        expands: whether a convolution widens it first.
        squeezes: whether it has a squeeze-and-excitation.
        nests_last: whether the last pair is a part of its own, as the others are.
    """
    convolutions = ("conv_pw", "conv_dw", "conv_pwl") if expands else ("conv_dw", "conv_pw")
    *pairs, last = [((conv, "0"), (f"bn{number}", "1")) for number, conv in enumerate(convolutions, start=1)]
    if squeezes:
        pairs.append((("se.conv_reduce", "fc1"), ("se.conv_expand", "fc2")))
    layers = {name: f"{number}.{inner}" for number, pair in enumerate(pairs) for name, inner in pair}
    for index, (name, inner) in enumerate(last):
        layers[name] = f"{len(pairs)}.{inner}" if nests_last else f"{len(pairs) + index}"
    return _layers(rf"blocks[.]{place}[.]", own, layers)


def efficientnet() -> Names:
    """An EfficientNet's of any depth."""
    names = efficientnet_blocks() | _layers("", "", {"conv_head": "features.8.0", "bn2": "features.8.1"})
    return names | _layers("", "", {"classifier": "classifier.1"})


def efficientnet_blocks() -> Names:
    """An EfficientNet's, up to the last block."""
    return MOBILE_STEM | _mobile_stages(EFFICIENTNET_STAGES)


def efficientnet_v2_blocks() -> Names:
    """An EfficientNetV2's, up to the last block."""
    names = MOBILE_STEM | _layers(r"blocks[.]0[.](\d+)[.]", r"features.1.\1.block.", {"conv": "0.0", "bn1": "0.1"})
    fused = {"conv_exp": "0.0", "bn1": "0.1", "conv_pwl": "1.0", "bn2": "1.1"}
    for stage in V2_FUSED_STAGES:
        names |= _layers(rf"blocks[.]{stage}[.](\d+)[.]", rf"features.{stage + 1}.\1.block.", fused)
    return names | _mobile_stages(EFFICIENTNET_STAGES[V2_FUSED_STAGES.stop :])


def _mobile_stages(stages: Iterable[int]) -> Names:
    """An EfficientNet's blocks with squeeze-and-excitation in these stages; those of the first do not expand."""
    names: Names = {}
    for stage in stages:
        names |= _block(rf"{stage}[.](\d+)", rf"features.{stage + 1}.\1.block.", expands=stage > 0, squeezes=True)
    return names


def mobilenet_v2() -> Names:
    """MobileNetV2's of any width."""
    names = MOBILE_STEM | _layers("", "", {"conv_head": "features.18.0", "bn2": "features.18.1"})
    for number, (stage, block) in enumerate(_places(V2_BLOCKS), start=1):
        own = f"features.{number}.conv."
        names |= _block(rf"{stage}[.]{block}", own, expands=stage > 0, squeezes=False, nests_last=False)
    return names | _layers("", "", {"classifier": "classifier.1"})


def mobilenet_v3(blocks: tuple[int, ...], squeezing: tuple[int, ...]) -> Names:
    """MobileNetV3's, up to the mean over the image.

    Args:
        blocks: how many each stage has.
        squeezing: the numbers of the stages whose blocks have a squeeze-and-excitation.
    """
    names = dict(MOBILE_STEM)
    for number, (stage, block) in enumerate(_places(blocks), start=1):
        own = f"features.{number}.block."
        names |= _block(rf"{stage}[.]{block}", own, expands=stage > 0, squeezes=stage in squeezing)
    last = {"conv": "0", "bn1": "1"}
    return names | _layers(rf"blocks[.]{len(blocks)}[.]0[.]", f"features.{sum(blocks) + 1}.", last)


def mnasnet() -> Names:
    """MNASNet-B1's of any width, whose stages torchvision counts from its eighth layer on."""
    names = _layers("", "", {"conv_stem": "layers.0", "bn1": "layers.1", "conv_head": "layers.14", "bn2": "layers.15"})
    separable = {"conv_dw": "3", "bn1": "4", "conv_pw": "6", "bn2": "7"}
    names |= _layers(r"blocks[.]0[.]0[.]", "layers.", separable)
    block = {"conv_pw": "0", "bn1": "1", "conv_dw": "3", "bn2": "4", "conv_pwl": "6", "bn3": "7"}
    for stage in range(1, MNASNET_STAGES):
        names |= _layers(rf"blocks[.]{stage}[.](\d+)[.]", rf"layers.{stage + 7}.\1.layers.", block)
    return names | _layers("", "", {"classifier": "classifier.1"})


def regnet() -> Names:
    """A RegNet's, whose blocks torchvision counts from 0 on."""

    def layer(own: str) -> Callable[[re.Match[str]], str]:
        def named(match: re.Match[str]) -> str:
            stage, block = match["stage"], int(match["block"]) - 1
            return f"trunk_output.block{stage}.block{stage}-{block}.{own}.{match['leaf']}"

        return named

    pairs = {"conv1": "f.a", "conv2": "f.b", "conv3": "f.c", "downsample": "proj"}
    layers = {f"{theirs}.{part}": f"{own}.{place}" for theirs, own in pairs.items() for part, place in CONV_NORM}
    layers |= {f"se.{part}": f"f.se.{part}" for part in ("fc1", "fc2")}
    names: Names = {}
    for theirs, own in layers.items():
        names[rf"s(?P<stage>\d+)[.]b(?P<block>\d+)[.]{re.escape(theirs)}{LEAF}"] = layer(own)
    return names | _layers("", "", {**{f"stem.{part}": f"stem.{place}" for part, place in CONV_NORM}, "head.fc": "fc"})


def _places(blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """The stage and the number in it of each block."""
    return [(stage, block) for stage, count in enumerate(blocks) for block in range(count)]
