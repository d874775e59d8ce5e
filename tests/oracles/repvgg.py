"""A PyTorch definition of RepVGG from the paper, with its authors' names. It shares nothing with ours."""

import re

import torch.nn.functional as F
from torch import nn

from tests.oracles.torchvision_sizes import numbers

PAPER = {
    "a0": ([48, 96, 192, 1280], [2, 4, 14, 1]),
    "a2": ([96, 192, 384, 1408], [2, 4, 14, 1]),
    "b0": ([64, 128, 256, 1280], [4, 6, 16, 1]),
    "b1": ([128, 256, 512, 2048], [4, 6, 16, 1]),
}


def normed(i, o, kernel, stride, groups):
    part = nn.Sequential()
    part.add_module("conv", nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False))
    part.add_module("bn", nn.BatchNorm2d(o))
    return part


class Branches(nn.Module):
    def __init__(self, i, o, stride, groups):
        super().__init__()
        if i == o and stride == 1:
            self.rbr_identity = nn.BatchNorm2d(i)
        self.rbr_dense, self.rbr_1x1 = normed(i, o, 3, stride, groups), normed(i, o, 1, stride, groups)

    def forward(self, x):
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.relu(total + self.rbr_identity(x) if hasattr(self, "rbr_identity") else total)


class Joined(nn.Module):
    def __init__(self, i, o, stride, groups):
        super().__init__()
        self.rbr_reparam = nn.Conv2d(i, o, 3, stride, 1, groups=groups)

    def forward(self, x):
        return F.relu(self.rbr_reparam(x))


class RepVGG(nn.Module):
    """With `strides` of the stem and of each stage."""

    def __init__(self, widths, depths, groups, block, strides, classes):
        super().__init__()
        i = min(64, widths[0])
        self.stage0, layer = block(3, i, strides[0], 1), 1
        for number, (o, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            blocks = []
            for index in range(depth):
                blocks.append(block(i, o, 1 if index else strides[number], 1 if layer % 2 else groups))
                i, layer = o, layer + 1
            setattr(self, f"stage{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(i, classes)

    def forward(self, x):
        number = 0
        while hasattr(self, f"stage{number}"):
            x, number = getattr(self, f"stage{number}")(x), number + 1
        return self.linear(x.mean((2, 3)))


def repvgg(name, classes):
    """From a name as `--model` takes it."""
    size, groups = re.search(r"_([ab]\d)", name), re.search(r"g(\d)", name.removeprefix("repvgg"))
    widths, depths = PAPER[size[1]] if size else (numbers(name, "w"), numbers(name, "d"))
    unstrided = {"6": 1, "8": 2}.get(name[-1] if "stride" in name else "", 0)
    strides = [1] * unstrided + [2] * (1 + len(widths) - unstrided)
    block = Joined if "deploy" in name else Branches
    return RepVGG(widths, depths, int(groups[1]) if groups else 1, block, strides, classes)
