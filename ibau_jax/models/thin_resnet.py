"""ResNets for CIFAR-10 as He et al. (2016, section 4.2) have them: stages of 16, 32, 64 features, 6n + 2 layers.

Names say what the state dict does: `thin_resnet20` has shortcuts without weights (option A) and `linear`,
`thin_resnet56_downsample_fc` has projections (option B) called `downsample`, and `fc`. Where a shortcut has no weights
it also leaves no trace of where its channels of zeros are: around the others, or behind them (`_pad_behind`).
"""

import re
from collections.abc import Iterator
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import stage
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, Family, Shapes, register_family
from ibau_jax.models.resnet import BasicBlock, Style
from ibau_jax.models.sizes import count_matching

WIDTH, DEEPEST, WIDEST = 16, 170, 1024
NAME = re.compile(
    r"thin_resnet(?P<depth>\d{1,4})(_w(?P<width>\d{1,4}))?(_(?P<shortcut>shortcut|downsample))?(?P<fc>_fc)?"
    r"(?P<behind>_pad_behind)?"
)


class ThinResNet(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(
        self, style: Style, count: int, width: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
    ) -> None:
        block = partial(BasicBlock, style, rngs)
        self.conv1, self.bn1 = conv(3, width, 3, rngs), batch_norm(width, rngs)
        self.layer1 = stage(block, width, width, count, 1)
        self.layer2 = stage(block, width, 2 * width, count, 2)
        self.layer3 = stage(block, 2 * width, 4 * width, count, 2)
        setattr(self, style.classifier, linear(4 * width, num_classes, rngs))
        self.classifier_name, self.activation = style.classifier, relu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv1, self.bn1, x))
        x = self.layer3(self.layer2(self.layer1(x)))
        kernel = x.shape[2] if self.classifier_name == "linear" else 0  # akamaster's F.avg_pool2d(x, x.size()[3])
        classifier: nnx.Linear = getattr(self, self.classifier_name)
        return classifier(global_average(x, kernel=kernel))


def _make(match: re.Match[str]) -> Architecture | None:
    depth, width = int(match["depth"]), int(match["width"] or WIDTH)
    classifier, shortcut, behind = "fc" if match["fc"] else "linear", match["shortcut"], match["behind"]
    if depth % 6 != 2 or not 8 <= depth <= DEEPEST or not 1 <= width <= WIDEST or (behind and shortcut):
        return None
    style = Style(shortcut or "shortcut", classifier, padding=None if shortcut else "behind" if behind else "around")
    count = (depth - 2) // 6
    return Architecture(
        name=match[0],
        build=partial(ThinResNet, style, count, width),
        classifier=f"{classifier}.weight",
        landmarks={
            f"layer3.{count - 1}.conv2.weight": (4 * width, 4 * width, 3, 3),
            f"layer1.{count - 1}.conv2.weight": (width, width, 3, 3),
        },
        variant_of=match[0].removesuffix(behind) if behind else None,
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    count = count_matching(r"layer3\.\d+\.conv2\.weight", shapes)
    stem = shapes.get("conv1.weight", ())
    whole = all(f"layer{stage}.{count - 1}.conv2.weight" in shapes for stage in (1, 2, 3))
    if not count or not whole or len(stem) != 4 or any(name.startswith("layer4.") for name in shapes):
        return
    width = "" if stem[0] == WIDTH else f"_w{stem[0]}"
    shortcut = next((f"_{kind}" for kind in ("shortcut", "downsample") if f"layer2.0.{kind}.0.weight" in shapes), "")
    yield f"thin_resnet{6 * count + 2}{width}{shortcut}{'_fc' if 'fc.weight' in shapes else ''}"


register_family(Family(NAME, "thin_resnet20", _make, _propose, ("_pad_behind",)))
