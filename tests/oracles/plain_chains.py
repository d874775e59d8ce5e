"""Small networks as people write them by hand, in PyTorch: what is between the layers with weights is in no name."""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn


def conv(i, o, k, p=0, s=1, bias=True):
    return nn.Conv2d(i, o, k, padding=p, stride=s, bias=bias)


class MnistTutorial(nn.Module):
    """Two unpadded 5x5 convolutions, dropout of maps, pooling by functions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv2_drop = conv(1, 10, 5), conv(10, 20, 5), nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = F.dropout(F.relu(self.fc1(x.flatten(1))), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def lenet5(act, pool):
    return nn.Sequential(
        *(conv(1, 6, 5, 2), act(), pool(2), conv(6, 16, 5), act(), pool(2), nn.Flatten()),
        *(nn.Linear(400, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10)),
    )


class Lenet5Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c3 = conv(1, 6, 5, 2), conv(6, 16, 5)
        self.f5, self.f6, self.out = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.avg_pool2d(self.c1(x).tanh(), 2)
        x = F.avg_pool2d(self.c3(x).tanh(), 2).flatten(1)
        return self.out(self.f6(self.f5(x).tanh()).tanh())


class VggLike(nn.Module):
    def __init__(self, drop=0.3):
        super().__init__()
        layers, i = [], 3
        for o in (16, 32, 64):
            layers += [conv(i, o, 3, 1), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o, 3, 1), nn.BatchNorm2d(o), nn.ReLU()]
            layers += [nn.MaxPool2d(2), nn.Dropout(drop)]
            i = o
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(1024, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def strided():
    return nn.Sequential(
        *(conv(3, 16, 4, 1, 2), nn.LeakyReLU(0.2)),
        *(conv(16, 32, 4, 1, 2, False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2)),
        *(conv(32, 64, 4, 1, 2, False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(1024, 10)),
    )


class AllConvolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 24, 3, 1), conv(24, 24, 3, 1), conv(24, 24, 3, 1, 2)
        self.conv4, self.conv5, self.conv6 = conv(24, 48, 3, 1), conv(48, 48, 3, 1), conv(48, 48, 3, 1, 2)
        self.conv7, self.head = conv(48, 48, 3, 1), conv(48, 10, 1)

    def forward(self, x):
        for one in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6, self.conv7):
            x = F.relu(one(x))
        return self.head(x).mean((2, 3))


class Lenet96(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 8, 5), conv(8, 16, 5), conv(16, 32, 5)
        self.fc1, self.fc2 = nn.Linear(32 * 8 * 8, 64), nn.Linear(64, 10)

    def forward(self, x):
        for one in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(one(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class NormsLast(nn.Module):
    """All BatchNorms are declared behind all convolutions, and that of a linear layer behind all of these."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 16, 3, 1), conv(16, 16, 3, 1), conv(16, 32, 3, 1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(32)
        self.fc1, self.fc2 = nn.Linear(512, 32), nn.Linear(32, 10)

    def forward(self, x):
        for one, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.max_pool2d(F.relu(norm(one(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def norm_behind_relu():
    """As Keras users write it."""
    return nn.Sequential(
        *(conv(1, 16, 3, 1), nn.ReLU(), nn.BatchNorm2d(16), conv(16, 16, 3, 1), nn.ReLU(), nn.BatchNorm2d(16)),
        *(nn.MaxPool2d(2), conv(16, 32, 3, 1), nn.ReLU(), nn.BatchNorm2d(32), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(1568, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 10)),
    )


class Blocks(nn.Module):
    """Two blocks of convolution, BatchNorm, ReLU and pooling, one linear layer."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(conv(1, 16, 5, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(conv(16, 32, 5, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(7 * 7 * 32, 10)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x)).reshape(x.size(0), -1))


class Mlp(nn.Module):
    def __init__(self, inputs, norm):
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(inputs, 64), nn.BatchNorm1d(64) if norm else nn.Identity()
        self.fc2, self.bn2 = nn.Linear(64, 32), nn.BatchNorm1d(32) if norm else nn.Identity()
        self.fc3 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.fc1(x.flatten(1))))
        return self.fc3(F.relu(self.bn2(self.fc2(x))))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x):
        return self.linear(x.view(-1, 784))


class Cifar64(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            conv(3, 8, 3, 1),
            conv(8, 16, 3, 1),
            conv(16, 32, 3, 1),
            conv(32, 32, 3, 1),
        )
        self.pool, self.fc1, self.fc2 = nn.MaxPool2d(2, 2), nn.Linear(512, 64), nn.Linear(64, 10)

    def forward(self, x):
        for one in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.pool(F.relu(one(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Averaged(nn.Module):
    """BatchNorm without biases, global average pooling."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64, 64)
        self.convs = nn.ModuleList(conv(i, o, 3, 1, bias=False) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths[1:])
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        for place, (one, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(one(x)))
            x = F.max_pool2d(x, 2) if place < 3 else x
        return self.out(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PairsGrey(nn.Module):
    """Pairs of 5x5 and of 3x3 convolutions, each padded, with pooling and dropout behind each pair."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(conv(1, 16, 5, 2), nn.ReLU(), conv(16, 16, 5, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
            *(conv(16, 32, 3, 1), nn.ReLU(), conv(32, 32, 3, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
            *(nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)),
        )

    def forward(self, x):
        return self.net(x)


class Unpadded(nn.Module):
    """Three unpadded 3x3 convolutions, the first two pooled."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 16, 3), conv(16, 32, 3), conv(32, 32, 3)
        self.pool, self.fc1, self.fc2 = nn.MaxPool2d(2, 2), nn.Linear(32 * 4 * 4, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.conv3(x))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class PooledOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(1, 8, 3), conv(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16 * 12 * 12, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class StridedGrey(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.fc = conv(1, 16, 3, 1, 2), conv(16, 32, 3, 1, 2), nn.Linear(32 * 7 * 7, 10)

    def forward(self, x):
        return self.fc(F.relu(self.c2(F.relu(self.c1(x)))).flatten(1))


# By name: how it is made, the images' channels and size, and the chain that it is, in the words of names here.
CHAINS = {
    "mnist_tutorial": (
        MnistTutorial,
        "chain1x28-conv1=10_k5-relu-max2-conv2=20_k5-relu-max2-flat-fc1=50-relu-fc2=classes",
    ),
    "lenet5": (
        lambda: lenet5(nn.ReLU, nn.MaxPool2d),
        "chain1x28-0=6_k5_p2-relu-max2-3=16_k5-relu-max2-flat-7=120-relu-9=84-relu-11=classes",
    ),
    "lenet5_tanh": (
        Lenet5Tanh,
        "chain1x28-c1=6_k5_p2-relu-max2-c3=16_k5-relu-max2-flat-f5=120-relu-f6=84-relu-out=classes+tanh+avg_pool",
    ),
    "vgg_like": (
        VggLike,
        "chain3x32-features.0=16_k3_p1-features.1=norm-relu-features.3=16_k3_p1-features.4=norm-relu-max2"
        "-features.8=32_k3_p1-features.9=norm-relu-features.11=32_k3_p1-features.12=norm-relu-max2"
        "-features.16=64_k3_p1-features.17=norm-relu-features.19=64_k3_p1-features.20=norm-relu-max2"
        "-flat-classifier.0=64-relu-classifier.3=classes",
    ),
    "strided": (
        strided,
        "chain3x32-0=16_k4_s2_p1-relu-2=32_k4_s2_p1_nobias-3=norm-relu-5=64_k4_s2_p1_nobias-6=norm-relu-flat-9=classes"
        "+leaky_relu0.2",
    ),
    "all_convolutional": (
        AllConvolutional,
        "chain3x32-conv1=24_k3_p1-relu-conv2=24_k3_p1-relu-conv3=24_k3_s2_p1-relu-conv4=48_k3_p1-relu-conv5=48_k3_p1-relu"
        "-conv6=48_k3_s2_p1-relu-conv7=48_k3_p1-relu-head=classes_k1-mean1-flat",
    ),
    "lenet96": (
        Lenet96,
        "chain3x96-conv1=8_k5-relu-max2-conv2=16_k5-relu-max2-conv3=32_k5-relu-max2-flat-fc1=64-relu-fc2=classes",
    ),
    "norms_last": (
        NormsLast,
        "chain3x32-conv1=16_k3_p1-bn1=norm-relu-max2-conv2=16_k3_p1-bn2=norm-relu-max2-conv3=32_k3_p1-bn3=norm-relu-max2"
        "-flat-fc1=32-relu-fc2=classes",
    ),
    "norm_behind_relu": (
        norm_behind_relu,
        "chain1x28-0=16_k3_p1-relu-2=norm-3=16_k3_p1-relu-5=norm-max2-7=32_k3_p1-relu-9=norm-max2-flat"
        "-12=64-relu-14=norm-15=classes",
    ),
    "blocks": (
        Blocks,
        "chain1x28-layer1.0=16_k5_p2-layer1.1=norm-relu-max2-layer2.0=32_k5_p2-layer2.1=norm-relu-max2-flat-fc=classes",
    ),
    "mlp_norm": (lambda: Mlp(784, True), "chain1x28-flat-fc1=64-bn1=norm-relu-fc2=32-bn2=norm-relu-fc3=classes"),
    "mlp_rgb": (lambda: Mlp(3072, False), "chain3x32-flat-fc1=64-relu-fc2=32-relu-fc3=classes"),
    "linear": (Linear, "chain1x28-flat-linear=classes"),
    "cifar64": (
        Cifar64,
        "chain3x64-conv1=8_k3_p1-relu-max2-conv2=16_k3_p1-relu-max2-conv3=32_k3_p1-relu-max2-conv4=32_k3_p1-relu-max2"
        "-flat-fc1=64-relu-fc2=classes",
    ),
    "averaged": (
        Averaged,
        "chain3x32-convs.0=16_k3_p1_nobias-norms.0=norm-relu-max2-convs.1=32_k3_p1_nobias-norms.1=norm-relu-max2"
        "-convs.2=64_k3_p1_nobias-norms.2=norm-relu-max2-convs.3=64_k3_p1_nobias-norms.3=norm-relu-mean1-flat-out=classes",
    ),
    "pairs_grey": (
        PairsGrey,
        "chain1x28-0=16_k5_p2-relu-2=16_k5_p2-relu-max2-6=32_k3_p1-relu-8=32_k3_p1-relu-max2-flat-13=64-relu-16=classes",
    ),
    "unpadded": (
        Unpadded,
        "chain3x32-conv1=16_k3-relu-max2-conv2=32_k3-relu-max2-conv3=32_k3-relu-flat-fc1=64-relu-fc2=classes",
    ),
    "pooled_once": (
        PooledOnce,
        "chain1x28-conv1=8_k3-relu-conv2=16_k3-relu-max2-flat-fc1=32-relu-fc2=classes",
    ),
    "strided_grey": (StridedGrey, "chain1x28-c1=16_k3_s2_p1-relu-c2=32_k3_s2_p1-relu-flat-fc=classes"),
}
