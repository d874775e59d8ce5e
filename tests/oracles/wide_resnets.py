"""PyTorch definitions of Wide ResNets as meliketoy's and DeepMind's public code names them. They share nothing with ours."""

import torch.nn.functional as F
from torch import nn


class BiasedBlock(nn.Module):
    """The first convolution has no stride; the shortcut reads what the block was given."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, stride, 1)
        self.shortcut = nn.Sequential(*([nn.Conv2d(i, o, 1, stride)] if stride != 1 or i != o else []))

    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return out + self.shortcut(x)


class SamePaddedBlock(nn.Module):
    """Padded as TensorFlow pads, with Swish."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(i), nn.BatchNorm2d(o)
        self.pad = nn.ZeroPad2d(1 if stride == 1 else (0, 1, 0, 1))
        self.conv_0 = nn.Conv2d(i, o, 3, stride, 0, bias=False)
        self.conv_1 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False) if i != o else None

    def forward(self, x):
        active = F.silu(self.batchnorm_0(x))
        out = self.conv_1(F.silu(self.batchnorm_1(self.conv_0(self.pad(active)))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def groups(block, depth, k):
    """The blocks of the three groups."""
    widths = (16, 16 * k, 32 * k, 64 * k)
    for i, o, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
        rest = [block(o, o, 1) for _ in range((depth - 4) // 6 - 1)]
        yield nn.Sequential(block(i, o, stride), *rest)


class Meliketoy(nn.Module):
    def __init__(self, depth, k, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        self.layer1, self.layer2, self.layer3 = groups(BiasedBlock, depth, k)
        self.bn1, self.linear = nn.BatchNorm2d(64 * k), nn.Linear(64 * k, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, 8).flatten(1))


class DeepMind(nn.Module):
    """Of images that are normalised already: the public code does that first, and keeps no trace of it."""

    def __init__(self, depth, k, classes):
        super().__init__()
        self.init_conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer = nn.Sequential()
        for number, blocks in enumerate(groups(SamePaddedBlock, depth, k)):
            self.layer.add_module(str(number), nn.ModuleDict({"block": blocks}))
        self.batchnorm, self.logits = nn.BatchNorm2d(64 * k), nn.Linear(64 * k, classes)

    def forward(self, x):
        x = self.init_conv(x)
        for group in self.layer:
            x = group["block"](x)
        return self.logits(F.avg_pool2d(F.silu(self.batchnorm(x)), 8).flatten(1))


WRITTEN = {"meliketoy": Meliketoy, "deepmind": DeepMind}
