"""Networks for CIFAR-10 in PyTorch, with the names that kuangliu/pytorch-cifar and huyvnphan/PyTorch_CIFAR10 give them.

Written from what these compute; they share nothing with our models.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.oracles.torchvision_models import models


def googlenet_small_stem(classes):
    """huyvnphan's: torchvision's, its stem one convolution, its poolings those of a ResNet's stem."""
    net = models.googlenet(num_classes=classes, aux_logits=False, init_weights=False)
    net.conv1 = net.conv3
    net.conv1.conv = nn.Conv2d(3, 192, 3, padding=1, bias=False)
    net.maxpool1 = net.conv2 = net.conv3 = net.maxpool2 = nn.Identity()
    net.maxpool3 = net.maxpool4 = nn.MaxPool2d(3, 2, 1)
    return net


def inception_v3_small_stem(classes):
    """huyvnphan's: torchvision's behind one convolution."""
    net = models.inception_v3(num_classes=classes, aux_logits=False, init_weights=False)
    net.Conv2d_1a_3x3 = net.Conv2d_4a_3x3
    net.Conv2d_1a_3x3.conv = nn.Conv2d(3, 192, 3, padding=1, bias=False)
    net.Conv2d_2a_3x3 = net.Conv2d_2b_3x3 = net.Conv2d_3b_1x1 = net.Conv2d_4a_3x3 = nn.Identity()
    net.maxpool1 = net.maxpool2 = nn.Identity()
    return net


def steps(i, *convolutions):
    made = []
    for o, k in convolutions:
        made += [nn.Conv2d(i, o, k, padding=k // 2), nn.BatchNorm2d(o), nn.ReLU()]
        i = o
    return made


class FourBranches(nn.Module):
    def __init__(self, i, a, b0, b, c0, c, d):
        super().__init__()
        self.b1 = nn.Sequential(*steps(i, (a, 1)))
        self.b2 = nn.Sequential(*steps(i, (b0, 1), (b, 3)))
        self.b3 = nn.Sequential(*steps(i, (c0, 1), (c, 3), (c, 3)))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), *steps(i, (d, 1)))

    def forward(self, x):
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


class GoogLeNet(nn.Module):
    """kuangliu's."""

    def __init__(self, classes):
        super().__init__()
        self.pre_layers = nn.Sequential(*steps(3, (192, 3)))
        self.a3 = FourBranches(192, 64, 96, 128, 16, 32, 32)
        self.b3 = FourBranches(256, 128, 128, 192, 32, 96, 64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.a4 = FourBranches(480, 192, 96, 208, 16, 48, 64)
        self.b4 = FourBranches(512, 160, 112, 224, 24, 64, 64)
        self.c4 = FourBranches(512, 128, 128, 256, 24, 64, 64)
        self.d4 = FourBranches(512, 112, 144, 288, 32, 64, 64)
        self.e4 = FourBranches(528, 256, 160, 320, 32, 128, 128)
        self.a5 = FourBranches(832, 256, 160, 320, 32, 128, 128)
        self.b5 = FourBranches(832, 384, 192, 384, 48, 128, 128)
        self.linear = nn.Linear(1024, classes)

    def forward(self, x):
        x = self.maxpool(self.b3(self.a3(self.pre_layers(x))))
        x = self.maxpool(self.e4(self.d4(self.c4(self.b4(self.a4(x))))))
        return self.linear(self.b5(self.a5(x)).mean((2, 3)))


class Norm(nn.Module):
    """A convolution without bias, named `conv`, and BatchNorm, named `bn`; ReLU behind them."""

    def __init__(self, i, o, k):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(i, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Numbered(nn.Module):
    """Convolutions conv1, conv2, ... and bn1, bn2, ...: (in, out, kernel, stride, groups) of each."""

    def __init__(self, *convolutions):
        super().__init__()
        for n, (i, o, k, s, g) in enumerate(convolutions, 1):
            setattr(self, f"conv{n}", nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(o))

    def step(self, n, x):
        return getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(x))


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Split(Numbered):
    def __init__(self, o):
        h = o // 2
        super().__init__((h, h, 1, 1, 1), (h, h, 3, 1, h), (h, h, 1, 1, 1))

    def forward(self, x):
        left, right = x.chunk(2, 1)
        right = F.relu(self.step(3, self.step(2, F.relu(self.step(1, right)))))
        return shuffle(torch.cat([left, right], 1), 2)


class Down(Numbered):
    def __init__(self, i, o):
        h = o // 2
        super().__init__((i, i, 3, 2, i), (i, h, 1, 1, 1), (i, h, 1, 1, 1), (h, h, 3, 2, h), (h, h, 1, 1, 1))

    def forward(self, x):
        left = F.relu(self.step(2, self.step(1, x)))
        right = F.relu(self.step(5, self.step(4, F.relu(self.step(3, x)))))
        return shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV2(Numbered):
    def __init__(self, classes, a, b, c, last):
        super().__init__((3, 24, 3, 1, 1), (c, last, 1, 1, 1))
        for n, (i, o, more) in enumerate([(24, a, 3), (a, b, 7), (b, c, 3)], 1):
            setattr(self, f"layer{n}", nn.Sequential(Down(i, o), *[Split(o) for _ in range(more)]))
        self.linear = nn.Linear(last, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.step(1, x)))))
        return self.linear(F.relu(self.step(2, x)).mean((2, 3)))


class ShuffleUnit(Numbered):
    def __init__(self, i, o, s, g):
        o -= i if s == 2 else 0
        m, first = o // 4, 1 if i == 24 else g
        super().__init__((i, m, 1, 1, first), (m, m, 3, s, m), (m, o, 1, 1, g))
        self.g, self.s = first, s

    def forward(self, x):
        out = self.step(3, F.relu(self.step(2, shuffle(F.relu(self.step(1, x)), self.g))))
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self.s == 2 else out + x)


class ShuffleNet(Numbered):
    def __init__(self, classes, groups, a, b, c):
        super().__init__((3, 24, 1, 1, 1))
        for n, (i, o, count) in enumerate([(24, a, 4), (a, b, 8), (b, c, 4)], 1):
            units = [ShuffleUnit(o if index else i, o, 1 if index else 2, groups) for index in range(count)]
            setattr(self, f"layer{n}", nn.Sequential(*units))
        self.linear = nn.Linear(c, classes)

    def forward(self, x):
        return self.linear(self.layer3(self.layer2(self.layer1(F.relu(self.step(1, x))))).mean((2, 3)))


class Squeeze(nn.Module):
    def __init__(self, c, hidden):
        super().__init__()
        self.se1, self.se2 = nn.Conv2d(c, hidden, 1), nn.Conv2d(hidden, c, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.se2(F.relu(self.se1(F.adaptive_avg_pool2d(x, 1)))))


class RegBlock(Numbered):
    def __init__(self, i, o, s, group_width, squeezes):
        super().__init__((i, o, 1, 1, 1), (o, o, 3, s, o // group_width), (o, o, 1, 1, 1))
        self.se = Squeeze(o, i // 4) if squeezes else nn.Identity()
        projects = s != 1 or i != o
        self.shortcut = nn.Sequential(*([nn.Conv2d(i, o, 1, s, bias=False), nn.BatchNorm2d(o)] if projects else []))

    def forward(self, x):
        out = self.se(F.relu(self.step(2, F.relu(self.step(1, x)))))
        return F.relu(self.step(3, out) + self.shortcut(x))


class RegNet(Numbered):
    def __init__(self, classes, depths, widths, group_width, squeezes=False):
        super().__init__((3, 64, 3, 1, 1))
        i = 64
        for n, (depth, o, s) in enumerate(zip(depths, widths, (1, 1, 2, 2), strict=True), 1):
            blocks = [RegBlock(o if j else i, o, 1 if j else s, group_width, squeezes) for j in range(depth)]
            setattr(self, f"layer{n}", nn.Sequential(*blocks))
            i = o
        self.linear = nn.Linear(i, classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.relu(self.step(1, x))))))
        return self.linear(x.mean((2, 3)))


class DualPath(Numbered):
    def __init__(self, i, m, o, d, s, first):
        super().__init__((i, m, 1, 1, 1), (m, m, 3, s, 32), (m, o + d, 1, 1, 1))
        self.o = o
        self.shortcut = nn.Sequential()
        if first:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o + d, 1, s, bias=False), nn.BatchNorm2d(o + d))

    def forward(self, x):
        out = self.step(3, F.relu(self.step(2, F.relu(self.step(1, x)))))
        x, o = self.shortcut(x), self.o
        return F.relu(torch.cat([x[:, :o] + out[:, :o], x[:, o:], out[:, o:]], 1))


class DPN(Numbered):
    def __init__(self, classes, counts):
        super().__init__((3, 64, 3, 1, 1))
        i = 64
        for n, (count, d) in enumerate(zip(counts, (16, 32, 24, 128), strict=True), 1):
            blocks = []
            m, o = 48 * 2**n, 128 * 2**n
            for j in range(count):
                blocks.append(DualPath(i, m, o, d, 2 if n > 1 and j == 0 else 1, j == 0))
                i = o + (j + 2) * d
            setattr(self, f"layer{n}", nn.Sequential(*blocks))
        self.linear = nn.Linear(i, classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.relu(self.step(1, x))))))
        return self.linear(x.mean((2, 3)))


class TwoThrees(Numbered):
    def __init__(self, i, o, s):
        super().__init__((i, o, 3, s, 1), (o, o, 3, 1, 1))
        projects = s != 1 or i != o
        self.shortcut = nn.Sequential(*([nn.Conv2d(i, o, 1, s, bias=False), nn.BatchNorm2d(o)] if projects else []))

    def forward(self, x):
        return F.relu(self.step(2, F.relu(self.step(1, x))) + self.shortcut(x))


class Aggregated(nn.Module):
    """kuangliu's DLA tree of one level, or of two."""

    def __init__(self, i, o, level, s):
        super().__init__()
        self.root = Norm(2 * level * o, o, 1)
        if level == 2:
            self.prev_root, self.level_1 = TwoThrees(i, o, s), Aggregated(i, o, 1, s)
            i, s = o, 1
        self.left_node, self.right_node = TwoThrees(i, o, s), TwoThrees(o, o, 1)

    def forward(self, x):
        first = [self.prev_root(x), self.level_1(x)] if hasattr(self, "level_1") else []
        left = self.left_node(first[-1] if first else x)
        return self.root(torch.cat([*first, left, self.right_node(left)], 1))


class Paired(nn.Module):
    """kuangliu's SimpleDLA tree."""

    def __init__(self, i, o, level, s):
        super().__init__()
        self.root = Norm(2 * o, o, 1)
        if level == 2:
            self.left_tree, self.right_tree = Paired(i, o, 1, s), Paired(o, o, 1, 1)
        else:
            self.left_tree, self.right_tree = TwoThrees(i, o, s), TwoThrees(o, o, 1)

    def forward(self, x):
        left = self.left_tree(x)
        return self.root(torch.cat([left, self.right_tree(left)], 1))


class DLA(nn.Module):
    def __init__(self, classes, tree):
        super().__init__()
        for name, i, o in (("base", 3, 16), ("layer1", 16, 16), ("layer2", 16, 32)):
            parts = nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
            setattr(self, name, nn.Sequential(*parts))
        self.layer3, self.layer4 = tree(32, 64, 1, 1), tree(64, 128, 2, 2)
        self.layer5, self.layer6 = tree(128, 256, 2, 2), tree(256, 512, 1, 2)
        self.linear = nn.Linear(512, classes)

    def forward(self, x):
        for layer in (self.base, self.layer1, self.layer2, self.layer3, self.layer4, self.layer5, self.layer6):
            x = layer(x)
        return self.linear(x.mean((2, 3)))


class Depthwise(Numbered):
    def __init__(self, i, o, k, s):
        super().__init__((i, o, k, s, i))

    def forward(self, x):
        return self.step(1, x)


class PNASCell(nn.Module):
    def __init__(self, i, o, s, kind):
        super().__init__()
        self.s, self.kind = s, kind
        self.sep_conv1 = Depthwise(i, o, 7, s)
        if kind == "b":
            self.sep_conv2, self.sep_conv3 = Depthwise(i, o, 3, s), Depthwise(i, o, 5, s)
            self.conv2, self.bn2 = nn.Conv2d(2 * o, o, 1, bias=False), nn.BatchNorm2d(o)
        if s == 2:
            self.conv1, self.bn1 = nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o)

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, self.s, 1)
        pooled = self.bn1(self.conv1(pooled)) if self.s == 2 else pooled
        if self.kind == "a":
            return F.relu(self.sep_conv1(x) + pooled)
        both = F.relu(self.sep_conv1(x) + self.sep_conv2(x)), F.relu(pooled + self.sep_conv3(x))
        return F.relu(self.bn2(self.conv2(torch.cat(both, 1))))


class PNASNet(nn.Module):
    def __init__(self, classes, kind, w):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)
        for n in (1, 2, 3):
            o = w * 2 ** (n - 1)
            setattr(self, f"layer{2 * n - 1}", nn.Sequential(*[PNASCell(o, o, 1, kind) for _ in range(6)]))
            if n < 3:
                setattr(self, f"layer{2 * n}", PNASCell(o, 2 * o, 2, kind))
        self.linear = nn.Linear(4 * w, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4, self.layer5):
            x = layer(x)
        return self.linear(x.mean((2, 3)))


X400 = (1, 2, 7, 12), (32, 64, 160, 384), 16
ZOO = {
    "shufflenet_v2_x0_5_cifar": lambda classes: ShuffleNetV2(classes, 48, 96, 192, 1024),
    "shufflenet_v2_x1_0_cifar": lambda classes: ShuffleNetV2(classes, 116, 232, 464, 1024),
    "shufflenet_v2_x1_5_cifar": lambda classes: ShuffleNetV2(classes, 176, 352, 704, 1024),
    "shufflenet_v2_x2_0_cifar": lambda classes: ShuffleNetV2(classes, 224, 488, 976, 2048),
    "shufflenet_g2_cifar": lambda classes: ShuffleNet(classes, 2, 200, 400, 800),
    "shufflenet_g3_cifar": lambda classes: ShuffleNet(classes, 3, 240, 480, 960),
    "regnetx_200mf_cifar": lambda classes: RegNet(classes, (1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnetx_400mf_cifar": lambda classes: RegNet(classes, *X400),
    "regnety_400mf_cifar": lambda classes: RegNet(classes, *X400, True),
    "regnet_cifar_1x16_2x16_1x32_1x48_g8_se": lambda classes: RegNet(classes, (1, 2, 1, 1), (16, 16, 32, 48), 8, True),
    "dpn26_cifar": lambda classes: DPN(classes, (2, 2, 2, 2)),
    "dpn92_cifar": lambda classes: DPN(classes, (3, 4, 20, 3)),
    "dla_cifar": lambda classes: DLA(classes, Aggregated),
    "simple_dla_cifar": lambda classes: DLA(classes, Paired),
    "pnasnet_a_cifar": lambda classes: PNASNet(classes, "a", 44),
    "pnasnet_b_cifar": lambda classes: PNASNet(classes, "b", 32),
    "googlenet_small_stem": googlenet_small_stem,
    "googlenet_cifar": GoogLeNet,
    "inception_v3_small_stem": inception_v3_small_stem,
}
