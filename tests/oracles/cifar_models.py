"""PyTorch definitions of the CIFAR families with the names that published code gives them. They share nothing with ours."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from tests.oracles.cifar_zoo import ZOO
from tests.oracles.pytorch_cifar import pytorch_cifar
from tests.oracles.repvgg import repvgg
from tests.oracles.torchvision_models import models
from tests.oracles.torchvision_sizes import numbers, torchvision_of_size
from tests.oracles.transformers import swin
from tests.oracles.wide_resnets import WRITTEN


def chain(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


def conv(i, o, k=3, s=1):
    return nn.Conv2d(i, o, k, stride=s, padding=k // 2, bias=False)


class Basic(nn.Module):
    expansion = 1

    def __init__(self, i, o, s, shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv(i, o, 3, s), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o), nn.BatchNorm2d(o)
        self.name = shortcut
        projection = [conv(i, o, 1, s), nn.BatchNorm2d(o)] if s != 1 or i != o else []
        setattr(self, shortcut, nn.Sequential(*projection))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + getattr(self, self.name)(x))


class Bottle(nn.Module):
    expansion = 4

    def __init__(self, i, o, s, shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv(i, o, 1), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o, 3, s), nn.BatchNorm2d(o)
        self.conv3, self.bn3 = conv(o, 4 * o, 1), nn.BatchNorm2d(4 * o)
        self.name = shortcut
        projection = [conv(i, 4 * o, 1, s), nn.BatchNorm2d(4 * o)] if s != 1 or i != 4 * o else []
        setattr(self, shortcut, nn.Sequential(*projection))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + getattr(self, self.name)(x))


def layers(block, i, counts, widths=()):
    """The stages, each twice as wide as the one before unless there are `widths`, and what the last gives."""
    made, widths = [], widths or [i * 2**stage for stage in range(len(counts))]
    for stage, (o, count) in enumerate(zip(widths, counts, strict=True)):
        blocks = []
        for index in range(count):
            blocks.append(block(i, o, 2 if stage and not index else 1))
            i = o * block.expansion if hasattr(block, "expansion") else o
        made.append(nn.Sequential(*blocks))
    return made, i


COUNTS = {
    10: (1,) * 4,
    14: (1,) * 4,
    18: (2,) * 4,
    26: (2,) * 4,
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNet(nn.Module):
    """kuangliu's; with `shortcut="downsample", last="fc"` torchvision's names on a CIFAR stem."""

    def __init__(self, kind, counts, classes, widths=(64,), pool=None, shortcut="shortcut", last="linear"):
        super().__init__()
        width = widths[0]

        class Named(kind):
            def __init__(self, i, o, s):
                super().__init__(i, o, s, shortcut)

        self.conv1, self.bn1 = conv(3, width), nn.BatchNorm2d(width)
        (self.layer1, self.layer2, self.layer3, self.layer4), features = layers(
            Named, width, counts, widths[1:] and widths
        )
        self.pool, self.last = pool, last
        setattr(self, last, nn.Linear(features * (4 if pool else 1), classes))

    def forward(self, x):
        x = chain(F.relu(self.bn1(self.conv1(x))), self.layer1, self.layer2, self.layer3, self.layer4)
        x = F.avg_pool2d(x, self.pool) if self.pool else F.adaptive_avg_pool2d(x, 1)
        return getattr(self, self.last)(x.flatten(1))


def resnet(name, classes):
    """Of a name with a 3x3 stem, else torchvision's class with the sizes that the name says."""
    first, *words = name.split("_")
    depth, bottleneck = first.removeprefix("resnet"), first[-2:] in ("14", "26", "50", "01", "52")
    if depth:
        counts = COUNTS[int(depth)]
    else:
        bottleneck, counts, words = words[0] == "bottleneck", tuple(map(int, words[1:5])), words[5:]
    widths = numbers(name, "w") or [64]
    kind = Bottle if bottleneck else Basic
    if "cifar" in words:
        return ResNet(kind, counts, classes, widths, 4 if "cifar_64" in name else None)
    if "small" in words:
        return ResNet(kind, counts, classes, widths, shortcut="downsample", last="fc")
    kind = models.resnet.Bottleneck if bottleneck else models.resnet.BasicBlock
    return models.resnet.ResNet(kind, counts, classes)


def resnet_of_wider_bottlenecks(name, classes):
    """torchvision's class with the sizes that the name of a Wide ResNet or a ResNeXt of depth 26 says."""
    wide, grouped = re.search(r"resnet26_(\d+)", name), re.search(r"resnext26_(\d+)x(\d+)d", name)
    groups, of_group = map(int, grouped.groups()) if grouped else (1, 64 * int(wide[1]))
    options = {"groups": groups, "width_per_group": of_group}
    module = models.resnet.ResNet(models.resnet.Bottleneck, COUNTS[26], classes, **options)
    if name.endswith("_small_stem"):
        module.conv1, module.maxpool = conv(3, 64), nn.Identity()
    return module


class PreBasic(nn.Module):
    expansion = 1

    def __init__(self, i, o, s):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv(i, o, 3, s)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv(o, o)
        if s != 1 or i != o:
            self.shortcut = nn.Sequential(conv(i, o, 1, s))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        short = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + short


class SqueezedPreBasic(PreBasic):
    """kuangliu's, in SENet: each channel of the branch is scaled by what the mean says."""

    def __init__(self, i, o, s):
        super().__init__(i, o, s)
        self.fc1, self.fc2 = nn.Conv2d(o, o // 16, 1), nn.Conv2d(o // 16, o, 1)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        short = self.shortcut(active) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        scale = self.fc2(F.relu(self.fc1(F.avg_pool2d(out, out.size(2)))))
        return out * scale.sigmoid() + short


class PreBottle(nn.Module):
    expansion = 4

    def __init__(self, i, o, s):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv(i, o, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv(o, o, 3, s)
        self.bn3, self.conv3 = nn.BatchNorm2d(o), conv(o, 4 * o, 1)
        if s != 1 or i != 4 * o:
            self.shortcut = nn.Sequential(conv(i, 4 * o, 1, s))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        short = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return self.conv3(F.relu(self.bn3(out))) + short


class PreActResNet(nn.Module):
    """BackdoorBench's; with `final_norm` the variant with a last `bn`."""

    def __init__(self, depth, classes, final_norm=False):
        super().__init__()
        self.conv1 = conv(3, 64)
        block = PreBasic if depth < 50 else PreBottle
        (self.layer1, self.layer2, self.layer3, self.layer4), width = layers(block, 64, COUNTS[depth])
        if final_norm:
            self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x):
        x = chain(self.conv1(x), self.layer1, self.layer2, self.layer3, self.layer4)
        x = F.relu(self.bn(x)) if hasattr(self, "bn") else x
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SENet(nn.Module):
    """kuangliu's, which BackdoorBench has as well."""

    def __init__(self, depth, classes, size=32):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64), nn.BatchNorm2d(64)
        (self.layer1, self.layer2, self.layer3, self.layer4), width = layers(SqueezedPreBasic, 64, COUNTS[depth])
        self.linear = nn.Linear(width * (size // 32) ** 2, classes)

    def forward(self, x):
        x = chain(F.relu(self.bn1(self.conv1(x))), self.layer1, self.layer2, self.layer3, self.layer4)
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


PLANS = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}


class VGG(nn.Module):
    """kuangliu's, with one linear layer; with `hidden` three, as huyvnphan or backdoor-toolbox has them."""

    def __init__(self, depth, norm, classes, hidden=None, size=32, linear_first=False):
        super().__init__()
        parts, i = [], 3
        for item in PLANS[depth].split():
            if item == "M":
                parts.append(nn.MaxPool2d(2, 2))
                continue
            o = int(item)
            parts += [nn.Conv2d(i, o, 3, padding=1), *([nn.BatchNorm2d(o)] if norm else []), nn.ReLU()]
            i = o
        self.features = nn.Sequential(*parts)
        flat = 512 * (size // 32) ** 2
        self.classifier = nn.Linear(flat, classes)
        if hidden:
            one, two, last = nn.Linear(flat, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, classes)
            dropout, relu = nn.Dropout(), nn.ReLU()
            parts = (
                [one, relu, dropout, two, relu, dropout] if linear_first else [dropout, one, relu, dropout, two, relu]
            )
            self.classifier = nn.Sequential(*parts, last)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Wide(nn.Module):
    def __init__(self, i, o, s):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv(i, o, 3, s)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv(o, o)
        self.equal = i == o
        self.convShortcut = None if self.equal else conv(i, o, 1, s)

    def forward(self, x):
        if not self.equal:
            x = F.relu(self.bn1(x))
            out = self.conv1(x)
        else:
            out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return (x if self.equal else self.convShortcut(x)) + out


class WideStage(nn.Module):
    def __init__(self, n, i, o, s):
        super().__init__()
        self.layer = nn.Sequential(*[Wide(o if index else i, o, 1 if index else s) for index in range(n)])

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth, k, classes):
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = conv(3, 16)
        self.block1 = WideStage(n, 16, 16 * k, 1)
        self.block2 = WideStage(n, 16 * k, 32 * k, 2)
        self.block3 = WideStage(n, 32 * k, 64 * k, 2)
        self.bn1 = nn.BatchNorm2d(64 * k)
        self.fc = nn.Linear(64 * k, classes)

    def forward(self, x):
        x = F.relu(self.bn1(chain(self.conv1(x), self.block1, self.block2, self.block3)))
        return self.fc(F.avg_pool2d(x, 8).flatten(1))


class Inverted(nn.Module):
    def __init__(self, i, o, t, s):
        super().__init__()
        h = i * t
        self.s = s
        self.conv1, self.bn1 = nn.Conv2d(i, h, 1, bias=False), nn.BatchNorm2d(h)
        self.conv2, self.bn2 = nn.Conv2d(h, h, 3, s, 1, groups=h, bias=False), nn.BatchNorm2d(h)
        self.conv3, self.bn3 = nn.Conv2d(h, o, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut = nn.Sequential()
        if s == 1 and i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.s == 1 else out


class MobileNetV2(nn.Module):
    """kuangliu's."""

    plan = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]

    def __init__(self, classes):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 32), nn.BatchNorm2d(32)
        parts, i = [], 32
        for t, o, n, s in self.plan:
            for index in range(n):
                parts.append(Inverted(i, o, t, 1 if index else s))
                i = o
        self.layers = nn.Sequential(*parts)
        self.conv2, self.bn2 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(F.relu(self.bn2(self.conv2(x))), 4).flatten(1))


class LinearBottleneck(nn.Module):
    def __init__(self, i, o, s, t):
        super().__init__()
        h = i * t
        self.residual = nn.Sequential(
            *[nn.Conv2d(i, h, 1), nn.BatchNorm2d(h), nn.ReLU6()],
            *[nn.Conv2d(h, h, 3, s, 1, groups=h), nn.BatchNorm2d(h), nn.ReLU6()],
            *[nn.Conv2d(h, o, 1), nn.BatchNorm2d(o)],
        )
        self.add = s == 1 and i == o

    def forward(self, x):
        return self.residual(x) + x if self.add else self.residual(x)


class BiasedMobileNetV2(nn.Module):
    """weiaicunzai's, in backdoor-toolbox."""

    def __init__(self, classes):
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6())
        self.stage1 = LinearBottleneck(32, 16, 1, 1)
        for number, (n, i, o, s) in enumerate(
            [(2, 16, 24, 2), (3, 24, 32, 2), (4, 32, 64, 2), (3, 64, 96, 1), (3, 96, 160, 1)], 2
        ):
            blocks = [LinearBottleneck(i, o, s, 6)] + [LinearBottleneck(o, o, 1, 6) for _ in range(n - 1)]
            setattr(self, f"stage{number}", nn.Sequential(*blocks))
        self.stage7 = LinearBottleneck(160, 320, 1, 6)
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        self.conv2 = nn.Conv2d(1280, classes, 1)

    def forward(self, x):
        x = chain(x, self.pre, *[getattr(self, f"stage{number}") for number in range(1, 8)], self.conv1)
        return self.conv2(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class ThinBlock(nn.Module):
    """Two 3x3 convolutions; where maps shrink, the shortcut is a projection or every other pixel and zeros."""

    def __init__(self, i, o, stride, shortcut, behind):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.zeros, self.name = ((0, o - i) if behind else ((o - i) // 2,) * 2), shortcut
        self.stride = stride
        if shortcut and stride > 1:
            setattr(self, shortcut, nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 and self.name:
            x = getattr(self, self.name)(x)
        elif self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.zeros))
        return F.relu(out + x)


class ThinResNet(nn.Module):
    def __init__(self, depth, classes, width=16, shortcut=None, last="linear", behind=False):
        super().__init__()
        self.conv1, self.bn1, self.last = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), last
        i = width
        for number, o in enumerate((width, 2 * width, 4 * width), start=1):
            strides = [2 if number > 1 else 1] + [1] * ((depth - 2) // 6 - 1)
            made = [ThinBlock(i if not at else o, o, stride, shortcut, behind) for at, stride in enumerate(strides)]
            setattr(self, f"layer{number}", nn.Sequential(*made))
            i = o
        setattr(self, last, nn.Linear(i, classes))

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return getattr(self, self.last)(x.mean((2, 3)))


def thin_resnet(name, classes):
    depth, *words = name.removeprefix("thin_resnet").split("_")
    width = next((int(word[1:]) for word in words if word[1:].isdigit()), 16)
    shortcut = next((word for word in words if word in ("shortcut", "downsample")), None)
    return ThinResNet(int(depth), classes, width, shortcut, "fc" if "fc" in words else "linear", "behind" in words)


class SmallCNN(nn.Module):
    """Convolutions and linear layers by name, and what is done behind each: r(elu), p(ool), f(latten)."""

    def __init__(self, behind, **layers):
        super().__init__()
        self.behind = behind
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        for name, what in self.behind.items():
            x = getattr(self, name)(x)
            for one in what:
                x = {"r": F.relu, "p": lambda x: F.max_pool2d(x, 2), "f": lambda x: x.flatten(1)}[one](x)
        return x


def wanet_block(i, o):
    block = nn.Sequential()
    block.bn1, block.act, block.conv1 = nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, o, 3, 2, 1, bias=False)
    return block


def small_cnn(name, classes):
    conv, linear = nn.Conv2d, nn.Linear
    if name == "lenet":
        layers = {"conv1": conv(3, 6, 5), "conv2": conv(6, 16, 5), "fc1": linear(400, 120), "fc2": linear(120, 84)}
        behind = {"conv1": "rp", "conv2": "rpf", "fc1": "r", "fc2": "r", "fc3": ""}
        return SmallCNN(behind, **layers, fc3=linear(84, classes))
    if name == "lenet_nad":
        layers = {"conv1": conv(3, 32, 3), "conv2": conv(32, 64, 3), "fc1": linear(2304, 128)}
        return SmallCNN({"conv1": "pr", "conv2": "prf", "fc1": "r", "fc2": ""}, **layers, fc2=linear(128, classes))
    if name == "mnist_examples":
        layers = {"conv1": conv(1, 32, 3), "conv2": conv(32, 64, 3), "fc1": linear(9216, 128)}
        return SmallCNN({"conv1": "r", "conv2": "rpf", "fc1": "r", "fc2": ""}, **layers, fc2=linear(128, classes))
    if name == "mnist_backdoorbox":
        layers = {"conv1": conv(1, 16, 5), "conv2": conv(16, 32, 5), "fc1": linear(512, 512)}
        return SmallCNN({"conv1": "rp", "conv2": "rpf", "fc1": "r", "fc2": ""}, **layers, fc2=linear(512, classes))
    last = {"linear6": linear(1024, 512), "linear9": linear(512, classes)}
    if name == "mnist_input_aware":
        behind = {"conv1": "rp", "conv5": "rpf", "linear6": "r", "linear9": ""}
        return SmallCNN(behind, conv1=conv(1, 32, 5), conv5=conv(32, 64, 5), **last)
    behind = {"conv1": "r", "layer2": "", "layer3": "f", "linear6": "r", "linear9": ""}
    blocks = {"layer2": wanet_block(32, 64), "layer3": wanet_block(64, 64)}
    return SmallCNN(behind, conv1=conv(1, 32, 3, 2, 1), **blocks, **last)


def torch_oracle(name: str, classes: int, size: int) -> nn.Module:
    """The PyTorch module of a registered CIFAR architecture, from its name alone."""
    if name in ZOO:
        return ZOO[name](classes)
    if module := pytorch_cifar(name, classes, size):
        return module
    if name.startswith("densenet"):
        return small_stem_densenet(name.removesuffix("_small_stem"), classes)
    if (module := torchvision_of_size(name, classes)) is not None:
        return module
    if name == "mobilenet_v2_cifar":
        return MobileNetV2(classes)
    if name == "mobilenet_v2_weiaicunzai":
        return BiasedMobileNetV2(classes)
    if name.startswith(("lenet", "mnist_")):
        return small_cnn(name, classes)
    if name.startswith("repvgg"):
        return repvgg(name, classes)
    if name.startswith("swin"):
        return swin(name, classes)
    if name.startswith("thin_resnet"):
        return thin_resnet(name, classes)
    if name.startswith("wide_resnet") and not name.startswith("wide_resnet26"):
        depth, k, *written = name.removeprefix("wide_resnet").split("_")
        return (WRITTEN[written[0]] if written else WideResNet)(int(depth), int(k), classes)
    if name.startswith("senet"):
        return SENet(int(name.removeprefix("senet")), classes, size)
    if name.startswith("preact_resnet"):
        depth, _, norm = name.removeprefix("preact_resnet").partition("_")
        return PreActResNet(int(depth), classes, bool(norm))
    if name.startswith("resnet"):
        return resnet(name, classes)
    if name.startswith(("wide_resnet26", "resnext26")):
        return resnet_of_wider_bottlenecks(name, classes)
    depth, *kind = name.removeprefix("vgg").split("_")
    hidden = {"cifar": None, "3": 512}[kind[-1]] if kind[-1] in ("cifar", "3") else int(kind[-1].removeprefix("w"))
    return VGG(int(depth), "bn" in kind, classes, hidden, size, linear_first=kind[-1] != "3")


def small_stem_densenet(name, classes):
    """torchvision's, with the stem of huyvnphan's."""
    module = getattr(models, name)(num_classes=classes)
    module.features.conv0 = conv(3, module.features.conv0.out_channels)
    return module


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Random BatchNorm statistics, scales and biases: fresh ones are 0 and 1, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.random_(1, 10**9, generator=generator)
        elif not tensor.is_floating_point():  # a table that the module computed
            continue
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", ".bias", "in_proj_bias", "layer_scale", "bias_table")) or not tensor.any():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif tensor.ndim == 1:
            tensor.uniform_(0.8, 1.2, generator=generator)
    return module.eval()
