"""The networks that `cases/wanted_checkpoints.md` lists, as libraries or public code make them, without weights.

They are written from what the code of their sources computes, and share nothing with our models.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.oracles import hugging_face
from tests.oracles.cifar_models import WideResNet, WideStage, conv, torch_oracle
from tests.oracles.look_alikes import mobilenet_v2
from tests.oracles.torchvision_models import models
from tests.oracles.wrapped import AttackerModel, EncoderAndLast, Lightning, Normalize, with_masked_neurons


class Norm(nn.Sequential):
    """A convolution named `conv` and BatchNorm named `bn`."""

    def __init__(self, i, o, k, s):
        super().__init__()
        self.conv, self.bn = conv(i, o, k, s), nn.BatchNorm2d(o)


class RepVGGBlock(nn.Module):
    """As it is trained: a 3x3 and a 1x1 convolution, and the block's input where it has the result's shape."""

    def __init__(self, i, o, s):
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(i) if i == o and s == 1 else None
        self.rbr_dense, self.rbr_1x1 = Norm(i, o, 3, s), Norm(i, o, 1, s)

    def forward(self, x):
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.relu(out if self.rbr_identity is None else out + self.rbr_identity(x))


class RepVGG(nn.Module):
    """chenyaofo's for small images: the first two stages have no stride."""

    def __init__(self, widths, classes, counts=(2, 4, 14, 1)):
        super().__init__()
        i = min(64, widths[0])
        self.stage0 = RepVGGBlock(3, i, 1)
        for number, (o, count) in enumerate(zip(widths, counts, strict=True), 1):
            blocks = [RepVGGBlock(i if n == 0 else o, o, 2 if number > 1 and n == 0 else 1) for n in range(count)]
            setattr(self, f"stage{number}", nn.Sequential(*blocks))
            i = o
        self.linear = nn.Linear(i, classes)

    def forward(self, x):
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        return self.linear(x.mean((2, 3)))


class Embeddings(nn.Module):
    def __init__(self, width, patch, places):
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.zeros(1, places + 1, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embeddings = nn.Conv2d(3, width, patch, patch)

    def forward(self, x):
        x = self.patch_embeddings(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.position_embeddings


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        query, key, value = (
            one(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for one in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.ffn = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.attn = Attention(width, heads)

    def forward(self, x):
        x = x + self.attn(self.attention_norm(x))
        return x + self.ffn["fc2"](F.gelu(self.ffn["fc1"](self.ffn_norm(x))))


class Jeonsworld(nn.Module):
    """The ViT of jeonsworld/ViT-pytorch, which chenyaofo's code has as well."""

    def __init__(self, classes, width=768, depth=12, patch=16, size=224):
        super().__init__()
        blocks = nn.ModuleList(TransformerBlock(width, width // 64) for _ in range(depth))
        encoder = nn.ModuleDict({"layer": blocks, "encoder_norm": nn.LayerNorm(width, eps=1e-6)})
        embeddings = Embeddings(width, patch, (size // patch) ** 2)
        self.transformer = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder})
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.transformer["embeddings"](x)
        for block in self.transformer["encoder"]["layer"]:
            x = block(x)
        return self.head(self.transformer["encoder"]["encoder_norm"](x[:, 0]))


def torchvisions(name, classes):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, num_classes=classes, **options)


def timms(name, classes):
    from tests.oracles.timm_models import made

    return made(name, classes)


def huyvnphans(name, classes):
    endings = {"densenet": "_small_stem", "googlenet": "_small_stem", "inception": "_small_stem", "vgg": "_cifar_w4096"}
    return of_name(name + next(ending for start, ending in endings.items() if name.startswith(start)), classes)


def of_name(name, classes):
    return torch_oracle(name, classes, 32)


def grey_resnet18(classes):
    module = models.resnet18(num_classes=classes)
    module.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return module


def with_head(name, classes, *hidden):
    module = models.get_model(name)
    last = nn.Linear(hidden[0].out_features if isinstance(hidden[0], nn.Linear) else module.fc.in_features, classes)
    module.fc = nn.Sequential(*hidden, last)
    return module


def trades(classes):
    """With the group that it makes and never calls."""
    module = WideResNet(34, 10, classes)
    module.sub_block1 = WideStage(5, 16, 160, 1)
    return module


def shufflenet_v2(classes):
    module = models.shufflenet_v2_x1_0(num_classes=classes)
    module.conv1[0].stride, module.maxpool = (1, 1), nn.Identity()
    return module


def resized_vit(classes):
    return nn.Sequential(nn.Upsample((224, 224), mode="bilinear"), torchvisions("vit_b_32", classes))


KUANGLIU = {
    "LeNet": "lenet",
    "DLA": "dla_cifar",
    "DPN26": "dpn26_cifar",
    "DenseNet121": "densenet121_cifar",
    "EfficientNetB0": "efficientnet_b0_cifar",
    "GoogLeNet": "googlenet_cifar",
    "MobileNet": "mobilenet_v1_cifar",
    "PNASNetA": "pnasnet_a_cifar",
    "PreActResNet101": "preact_resnet101",
    "RegNetX_200MF": "regnetx_200mf_cifar",
    "RegNetY_400MF": "regnety_400mf_cifar",
    "ResNeXt29_2x64d": "resnext29_2x64d_cifar",
    "ResNeXt29_32x4d": "resnext29_32x4d_cifar",
    "SENet18": "senet18",
    "ShuffleNetV2": "shufflenet_v2_x1_0_cifar",
    "SimpleDLA": "simple_dla_cifar",
    "densenet_cifar": "densenet_cifar",
}
OTHERS = {
    ("BppAttack", "mnist-NetC_MNIST"): "mnist_wanet",
    ("THUYimingLi/BackdoorBox", "BaselineMNISTNetwork"): "mnist_backdoorbox",
    ("VinAI/WaNet", "mnist-NetC_MNIST"): "mnist_wanet",
    ("VinAI/input-aware", "mnist-NetC_MNIST"): "mnist_input_aware",
    ("bboylyg/RNP", "mnist-NetC_MNIST"): "mnist_input_aware",
    ("pytorch/examples", "mnist Net"): "mnist_examples",
    ("akamaster/resnet_cifar10", "resnet20"): "thin_resnet20",
    ("akamaster/resnet_cifar10", "resnet56"): "thin_resnet56",
    ("akamaster/resnet_cifar10", "resnet110"): "thin_resnet110",
    ("vtu81/backdoor-toolbox", "SRA.resnet110"): "thin_resnet110",
    ("vtu81/backdoor-toolbox", "resnet.ResNet18_narrow"): "resnet18_cifar_w16_32_48_64",
    ("vtu81/backdoor-toolbox", "wide_resnet.Wide_ResNet-28-4"): "wide_resnet28_4_meliketoy",
    ("RobustBench", "dm_wide_resnet 28-10 swish"): "wide_resnet28_10_deepmind",
    ("chenyaofo/pytorch-cifar-models", "cifar10_vgg11_bn"): "vgg11_bn_cifar_w512",
    ("chenyaofo/pytorch-cifar-models", "cifar10_vgg16_bn"): "vgg16_bn_cifar_w512",
}
for source in ("bboylyg/ABL", "bboylyg/NAD"):
    OTHERS |= {(source, "LeNet5"): "lenet_nad", (source, "ResNet34 = resnet(depth=32)"): "thin_resnet32_downsample_fc"}
for name in ("cifar100_resnet32", "cifar10_resnet20", "cifar10_resnet56"):
    OTHERS["chenyaofo/pytorch-cifar-models", name] = f"thin_resnet{name[-2:]}_downsample_fc"
for source in ("xiaoyunxxy/BAN", "xuxiong0214/BTI-DBF"):
    OTHERS |= {
        (source, "densenet.DenseNet121"): "densenet121_cifar",
        (source, "densenet.densenet_cifar"): "densenet_cifar",
    }

WRITTEN = {
    ("practice", "torchvision resnet18, 1 channel"): grey_resnet18,
    ("practice", "Lightning ckpt with class-weighted loss"): lambda n: Lightning(torchvisions("resnet18", n), n),
    ("practice", "Sequential(Normalize buffers, kuangliu ResNet18)"): lambda n: nn.Sequential(
        Normalize(), of_name("resnet18_cifar", n)
    ),
    ("practice", "encoder + fc (SupCon style) torchvision resnet18"): lambda n: EncoderAndLast(models.resnet18(), n),
    ("practice", "torchvision resnet18, fc=Sequential(Dropout, Linear)"): lambda n: with_head(
        "resnet18", n, nn.Dropout()
    ),
    ("practice", "torchvision resnet50, fc=Sequential(Linear, ReLU, Linear)"): lambda n: with_head(
        "resnet50", n, nn.Linear(2048, 256), nn.ReLU(), nn.Dropout()
    ),
    ("MadryLab/robustness", "cifar resnet18"): lambda n: AttackerModel(of_name("resnet18_cifar", n)),
    ("MadryLab/robustness", "cifar resnet50"): lambda n: AttackerModel(of_name("resnet50_cifar", n)),
    ("MadryLab/robustness", "imagenet resnet18"): lambda n: AttackerModel(torchvisions("resnet18", n)),
    ("RobustBench", "wide_resnet.WideResNet-34-10 (TRADES, sub_block1)"): trades,
    ("bboylyg/RNP", "resnet18-MaskBatchNorm"): lambda n: with_masked_neurons(of_name("resnet18_cifar", n)),
    ("csdongxian/ANP", "resnet18-NoisyBatchNorm"): lambda n: with_masked_neurons(of_name("resnet18_cifar", n)),
    ("SCLBD/BackdoorBench", "vit_b_32"): resized_vit,
    ("chenyaofo/pytorch-cifar-models", "cifar10_mobilenetv2_x0_5"): lambda n: mobilenet_v2(n, 2, 0.5),
    ("chenyaofo/pytorch-cifar-models", "cifar10_repvgg_a0"): lambda n: RepVGG((48, 96, 192, 1280), n),
    ("chenyaofo/pytorch-cifar-models", "cifar10_shufflenetv2_x1_0"): shufflenet_v2,
    ("chenyaofo/pytorch-cifar-models", "cifar10_vit_b16"): Jeonsworld,
}
SMALL_DEIT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
HUGGING_FACE = {
    "ConvNextForImageClassification tiny": partial(hugging_face.made, "ConvNext"),
    "DeiTForImageClassification small": partial(hugging_face.made, "DeiT", **SMALL_DEIT),
    "ResNetForImageClassification 18": partial(hugging_face.made, "ResNet", **BASIC),
    "ResNetForImageClassification 50": partial(hugging_face.made, "ResNet"),
    "ViTForImageClassification base": partial(hugging_face.made, "ViT"),
}
WRITTEN |= {("HF transformers", name): make for name, make in HUGGING_FACE.items()}
WRITTEN |= {(source, name): partial(of_name, ours) for (source, name), ours in OTHERS.items()}
WRITTEN |= {("kuangliu/pytorch-cifar", name): partial(of_name, ours) for name, ours in KUANGLIU.items()}
LIBRARIES = {
    "timm": timms,
    "torchvision": torchvisions,
    "SCLBD/BackdoorBench": torchvisions,
    "huyvnphan/PyTorch_CIFAR10": huyvnphans,
}


def oracle(source, name, classes):
    """The PyTorch module of a row; None where there is no oracle here."""
    try:
        if make := WRITTEN.get((source, name)):
            return make(classes)
        return LIBRARIES[source](name, classes) if source in LIBRARIES else None
    except ImportError:  # transformers or timm is not installed
        return None
