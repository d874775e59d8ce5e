"""PyTorch networks whose state dicts have the names and shapes of others, written from the descriptions of the code that has them.

Each entry is the registered variant's name and how to make it for a number of classes. They share nothing with our models.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.oracles.cifar_models import PreActResNet, WideResNet, small_stem_densenet, thin_resnet
from tests.oracles.repvgg import repvgg
from tests.oracles.torchvision_models import models


def resnet(depth, classes, *, kernel=7, stride=2, pool=True, v1=False):
    """torchvision's ResNet with another stem, or with the strides of Caffe's and MSRA's bottlenecks."""
    module = getattr(models, f"resnet{depth}")(num_classes=classes)
    module.conv1 = nn.Conv2d(3, 64, kernel, stride, kernel // 2, bias=False)
    if not pool:
        module.maxpool = nn.Identity()
    if v1:
        for layer in (module.layer2, module.layer3, module.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return module


def mobilenet_v2(classes, unstrided, width=1.0):
    module = models.mobilenet_v2(num_classes=classes, width_mult=width)
    module.features[0][0].stride = (1, 1)
    if unstrided == 2:
        module.features[2].conv[1][0].stride = (1, 1)
    return module


def mobilenet_v3(classes, unstrided):
    module = models.mobilenet_v3_large(num_classes=classes)
    module.features[0][0].stride = (1, 1)
    if unstrided == 2:
        module.features[2].block[1][0].stride = (1, 1)
    return module


def efficientnet_b0(classes, unstrided):
    module = models.efficientnet_b0(num_classes=classes)
    module.features[0][0].stride = (1, 1)
    if unstrided == 2:
        module.features[2][0].block[1][0].stride = (1, 1)
    return module


def shufflenet_v2(classes):
    """chenyaofo/pytorch-cifar-models: the stem is a 3x3 convolution alone."""
    module = models.shufflenet_v2_x0_5(num_classes=classes)
    module.conv1[0].stride, module.maxpool = (1, 1), nn.Identity()
    return module


def densenet121(classes, stride, pool):
    module = models.densenet121(num_classes=classes)
    module.features.conv0.stride = (stride, stride)
    if not pool:
        module.features.pool0 = nn.Identity()
    return module


def small_stem_densenet121_without_pool(classes):
    module = small_stem_densenet("densenet121", classes)
    module.features.pool0 = nn.Identity()
    return module


def timm_model(name, classes):
    """timm's own model, with TensorFlow's padding and ε, or poolings against aliasing."""
    return pytest.importorskip("timm").create_model(name, num_classes=classes)


def googlenet(classes, transform_input):
    return models.googlenet(num_classes=classes, aux_logits=False, init_weights=False, transform_input=transform_input)


class SemiSupervisedWideResNet(WideResNet):
    """Of FixMatch's PyTorch code: LeakyReLU(0.1), and, past the first group, first blocks that read their input itself."""

    def __init__(self, depth, width, classes, leaky, raw):
        super().__init__(depth, width, classes)
        self.leaky, self.raw = leaky, raw

    def act(self, x):
        return F.leaky_relu(x, 0.1) if self.leaky else F.relu(x)

    def block(self, x, block, raw):
        active = x if raw else self.act(block.bn1(x))
        out = block.conv2(self.act(block.bn2(block.conv1(active))))
        return out + (x if block.convShortcut is None else block.convShortcut(active))

    def forward(self, x):
        x = self.conv1(x)
        for number, group in enumerate((self.block1, self.block2, self.block3)):
            for index, block in enumerate(group.layer):
                x = self.block(x, block, self.raw and number > 0 and index == 0)
        return self.fc(self.act(self.bn1(x)).mean((2, 3)))


class RawShortcutPreActResNet(PreActResNet):
    """The projection reads what the block was given, before normalisation and ReLU."""

    def forward(self, x):
        x = self.conv1(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                active = F.relu(block.bn1(x))
                out = block.conv1(active)
                out = block.conv2(F.relu(block.bn2(out)))
                x = out + (block.shortcut(x) if hasattr(block, "shortcut") and len(block.shortcut) else x)
        return self.linear(x.mean((2, 3)))


LOOK_ALIKES = {
    "resnet18_small_stem_max_pool": lambda classes: resnet(18, classes, kernel=3, stride=1),
    "resnet50_small_stem_max_pool": lambda classes: resnet(50, classes, kernel=3, stride=1),
    "resnet18_small_stem_stride2": lambda classes: resnet(18, classes, kernel=3, stride=2, pool=False),
    "resnet18_no_pool": lambda classes: resnet(18, classes, pool=False),
    "resnet18_stride1": lambda classes: resnet(18, classes, stride=1),
    "resnet50_v1": lambda classes: resnet(50, classes, v1=True),
    "resnet50_aa": lambda classes: timm_model("resnetaa50", classes),
    "resnet34d_aa": lambda classes: timm_model("resnetaa34d", classes),
    "resnet18_blur": lambda classes: timm_model("resnetblur18", classes),
    "resnet50d_blur": lambda classes: timm_model("resnetblur50d", classes),
    "mobilenet_v2_stride16": lambda classes: mobilenet_v2(classes, 1),
    "mobilenet_v2_stride8": lambda classes: mobilenet_v2(classes, 2),
    "mobilenet_v2_x0_5_stride8": lambda classes: mobilenet_v2(classes, 2, 0.5),
    "shufflenet_v2_x0_5_stride1_no_pool": shufflenet_v2,
    "mobilenet_v3_large_stride16": lambda classes: mobilenet_v3(classes, 1),
    "efficientnet_b0_stride16": lambda classes: efficientnet_b0(classes, 1),
    "efficientnet_b0_stride8": lambda classes: efficientnet_b0(classes, 2),
    "tf_efficientnet_b0": lambda classes: timm_model("tf_efficientnet_b0", classes),
    "tf_mobilenetv3_large_100": lambda classes: timm_model("tf_mobilenetv3_large_100", classes),
    "densenet121_stride1_no_pool": lambda classes: densenet121(classes, 1, False),
    "densenet121_small_stem_no_pool": small_stem_densenet121_without_pool,
    "wide_resnet10_1_leaky_raw": lambda classes: SemiSupervisedWideResNet(10, 1, classes, True, True),
    "wide_resnet10_1_raw": lambda classes: SemiSupervisedWideResNet(10, 1, classes, False, True),
    "wide_resnet28_2_leaky": lambda classes: SemiSupervisedWideResNet(28, 2, classes, True, False),
    "wide_resnet28_2_raw": lambda classes: SemiSupervisedWideResNet(28, 2, classes, False, True),
    "wide_resnet28_2_leaky_raw": lambda classes: SemiSupervisedWideResNet(28, 2, classes, True, True),
    "preact_resnet18_raw_shortcut": lambda classes: RawShortcutPreActResNet(18, classes),
    "googlenet_transform_input": lambda classes: googlenet(classes, transform_input=True),
    "repvgg_w80_96_d2_2_stride8": lambda classes: repvgg("repvgg_w80_96_d2_2_stride8", classes),
    "repvgg_w32_48_64_d2_2_1_stride16": lambda classes: repvgg("repvgg_w32_48_64_d2_2_1_stride16", classes),
    "thin_resnet20_pad_behind": lambda classes: thin_resnet("thin_resnet20_pad_behind", classes),
}


def calibrated(module, images, batch=100):
    """The module with the BatchNorm statistics that training on `images` (n, 3, h, w) would leave it with."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the average over all batches
            layer.reset_running_stats()
    module.train()
    with torch.no_grad():
        for start in range(0, len(images), batch):
            module(images[start : start + batch])
    return module.eval()
