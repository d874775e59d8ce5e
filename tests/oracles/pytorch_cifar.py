"""PyTorch definitions of networks that kuangliu/pytorch-cifar has, from descriptions. They share nothing with ours."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(i, o, k=3, s=1, groups=1):
    return nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False)


def swish(x):
    return x * x.sigmoid()


class Dense(nn.Module):
    def __init__(self, i, growth):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv(i, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([self.conv2(F.relu(self.bn2(out))), x], 1)


class Halving(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(i), conv(i, i // 2, 1)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    def __init__(self, growth, blocks, classes, size=32):
        super().__init__()
        i = 2 * growth
        self.conv1 = conv(3, i)
        for number, count in enumerate(blocks, 1):
            setattr(self, f"dense{number}", nn.Sequential(*[Dense(i + n * growth, growth) for n in range(count)]))
            i += count * growth
            if number < 4:
                setattr(self, f"trans{number}", Halving(i))
                i //= 2
        self.bn, self.linear = nn.BatchNorm2d(i), nn.Linear(i * (size // 32) ** 2, classes)

    def forward(self, x):
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense4(self.trans3(self.dense3(self.trans2(self.dense2(x)))))
        return self.linear(F.avg_pool2d(F.relu(self.bn(x)), 4).flatten(1))


class Grouped(nn.Module):
    def __init__(self, i, groups, width, s):
        super().__init__()
        h, o = groups * width, 2 * groups * width
        self.conv1, self.bn1 = conv(i, h, 1), nn.BatchNorm2d(h)
        self.conv2, self.bn2 = conv(h, h, 3, s, groups), nn.BatchNorm2d(h)
        self.conv3, self.bn3 = conv(h, o, 1), nn.BatchNorm2d(o)
        self.shortcut = nn.Sequential()
        if s != 1 or i != o:
            self.shortcut = nn.Sequential(conv(i, o, 1, s), nn.BatchNorm2d(o))

    def forward(self, x):
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNeXt(nn.Module):
    def __init__(self, count, groups, width, classes, size=32):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 1), nn.BatchNorm2d(64)
        i = 64
        for number in (1, 2, 3):
            made = []
            for index in range(count):
                made.append(Grouped(i, groups, width, 2 if number > 1 and not index else 1))
                i = 2 * groups * width
            setattr(self, f"layer{number}", nn.Sequential(*made))
            width *= 2
        self.linear = nn.Linear(i * (size // 32) ** 2, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, 8).flatten(1))


class Separable(nn.Module):
    def __init__(self, i, o, s):
        super().__init__()
        self.conv1, self.bn1 = conv(i, i, 3, s, i), nn.BatchNorm2d(i)
        self.conv2, self.bn2 = conv(i, o, 1), nn.BatchNorm2d(o)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class MobileNet(nn.Module):
    strided = (128, 256, 512, 1024)
    plan = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)

    def __init__(self, classes, size=32):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 32), nn.BatchNorm2d(32)
        made, i = [], 32
        for o in self.plan:
            made.append(Separable(i, o, 2 if o in self.strided and o != i else 1))
            i = o
        self.layers, self.linear = nn.Sequential(*made), nn.Linear(1024 * (size // 32) ** 2, classes)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(x, 2).flatten(1))


class SE(nn.Module):
    def __init__(self, i, squeezed):
        super().__init__()
        self.se1, self.se2 = nn.Conv2d(i, squeezed, 1), nn.Conv2d(squeezed, i, 1)

    def forward(self, x):
        return x * self.se2(swish(self.se1(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


class MBConv(nn.Module):
    """`conv1` and `bn1` are there in every block, and used where it expands."""

    def __init__(self, i, o, t, k, s):
        super().__init__()
        h = i * t
        self.conv1, self.bn1 = conv(i, h, 1), nn.BatchNorm2d(h)
        self.conv2, self.bn2 = conv(h, h, k, s, h), nn.BatchNorm2d(h)
        self.se = SE(h, i // 4)
        self.conv3, self.bn3 = conv(h, o, 1), nn.BatchNorm2d(o)
        self.expands, self.skips = t > 1, s == 1 and i == o

    def forward(self, x):
        out = swish(self.bn1(self.conv1(x))) if self.expands else x
        out = self.bn3(self.conv3(self.se(swish(self.bn2(self.conv2(out))))))
        return out + x if self.skips else out


class EfficientNetB0(nn.Module):
    plan = "1 16 1 3 1, 6 24 2 3 2, 6 40 2 5 2, 6 80 3 3 2, 6 112 3 5 1, 6 192 4 5 2, 6 320 1 3 1"

    def __init__(self, classes):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 32), nn.BatchNorm2d(32)
        made, i = [], 32
        for stage in self.plan.split(", "):
            t, o, count, k, s = map(int, stage.split())
            for index in range(count):
                made.append(MBConv(i, o, t, k, 1 if index else s))
                i = o
        self.layers, self.linear = nn.Sequential(*made), nn.Linear(320, classes)

    def forward(self, x):
        x = self.layers(swish(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


SIZES = {
    "": (12, (6, 12, 24, 16)),
    "121": (32, (6, 12, 24, 16)),
    "161": (48, (6, 12, 36, 24)),
    "169": (32, (6, 12, 32, 32)),
    "201": (32, (6, 12, 48, 32)),
}


def pytorch_cifar(name, classes, size):
    """The module of that name here; None where kuangliu has no such network that is not in `cifar_models`."""
    first, *rest = name.split("_")
    if name.startswith("densenet") and "cifar" in rest:
        growth, *blocks = (int(part.removeprefix("k")) for part in rest[1:]) if rest[1:] else (0,)
        return DenseNet(*((growth, blocks) if growth else SIZES[first.removeprefix("densenet")]), classes, size)
    if name.startswith("resnext") and "cifar" in rest:
        groups, width = rest[0].removesuffix("d").split("x")
        return ResNeXt((int(first.removeprefix("resnext")) - 2) // 9, int(groups), int(width), classes, size)
    if name == "mobilenet_v1_cifar":
        return MobileNet(classes, size)
    return EfficientNetB0(classes) if name == "efficientnet_b0_cifar" else None
