"""timm's own models, in timm's spelling, both ways."""

from functools import partial

import jax
import numpy as np
import pytest
import torch

from ibau_jax import load, save
from tests.oracles import torchvision_models  # noqa: F401 - before timm imports torchvision
from tests.oracles.cifar_models import randomise
from tests.oracles.twins import as_torch

timm = pytest.importorskip("timm")
mlp_mixer = pytest.importorskip("timm.models.mlp_mixer")
CLASSES = 5
SMALL = {"img_size": 32, "patch_size": 8}
SMALL_SWIN = {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "img_size": 32}
SMALL_RESMLP = {"mlp_ratio": 4, "block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine}


def model(name, **options):
    return partial(timm.create_model, name, **options)


def quieter(name, **options):
    """timm's, its convolutions weaker: as it makes them, features grow with depth, until rounding decides the logits."""
    module = timm.create_model(name, **options)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data *= 0.6
    return module


def joined(name):
    """With each block's branches as one convolution, as they are behind training."""
    return lambda num_classes: timm.utils.reparameterize_model(timm.create_model(name, num_classes=num_classes))


MODELS = {
    "vit_w192_d2_p8": model("vit_tiny_patch16_224", depth=2, **SMALL),
    "vit_w256_d2_p8": model("vit_base_patch16_224", depth=2, **SMALL, embed_dim=256, num_heads=4),
    "vit_w192_d2_p8_distilled": model("deit_tiny_distilled_patch16_224", depth=2, **SMALL),
    "vit_w128_d2_p8_deit3": model("deit3_small_patch16_224", depth=2, **SMALL, embed_dim=128, num_heads=2),
    "vit_w192_d2_p8_layer_scale": model("vit_tiny_patch16_224", depth=2, **SMALL, init_values=1e-5),
    "cait_w96_d2_p8": model("cait_xxs24_224", depth=2, **SMALL, embed_dim=96, num_heads=2),
    "cait_w96_d2_c1_h4_p8": model("cait_xxs24_224", depth=2, **SMALL, embed_dim=96, num_heads=4, depth_token_only=1),
    "swin_w32_d2_2_window7_4_timm": model("swin_tiny_patch4_window7_224", **SMALL_SWIN),
    "mixer_w64_d2_p8": partial(mlp_mixer.MlpMixer, num_blocks=2, embed_dim=64, **SMALL),
    "resmlp_w64_d2_p8": partial(mlp_mixer.MlpMixer, num_blocks=2, embed_dim=64, **SMALL, **SMALL_RESMLP),
}
SMALLEST = tuple(MODELS)
MODELS |= {
    "resnext50_32x4d": model("resnext50_32x4d"),
    "wide_resnet50_2": model("wide_resnet50_2"),
    "inception_v3": model("inception_v3"),
    "resnet26": model("resnet26"),
    "seresnet18": model("seresnet18"),
    "seresnet50": model("seresnet50"),
    "seresnext50_32x4d": model("seresnext50_32x4d"),
    "seresnext26d_32x4d": model("seresnext26d_32x4d"),
    "resnet10t": model("resnet10t"),
    "resnet14t": model("resnet14t"),
    "resnet18d": model("resnet18d"),
    "resnet50d": model("resnet50d"),
    "resnet50c": model("resnet50c"),
    "resnet50s": model("resnet50s"),
    "resnet200d": model("resnet200d"),
    "vit_ti_16": model("deit_tiny_patch16_224"),
    "vit_s_16_deit3": model("deit3_small_patch16_224"),
    "cait_xxs24": model("cait_xxs24_224"),
    "vit_ti_16_distilled": model("deit_tiny_distilled_patch16_224"),
    "swin_t_timm": model("swin_tiny_patch4_window7_224"),
    "efficientnet_b0": model("efficientnet_b0"),
    "efficientnet_b3": model("efficientnet_b3"),
    "efficientnet_b5_timm": model("efficientnet_b5"),
    "tf_efficientnetv2_s": partial(quieter, "tf_efficientnetv2_s"),
    "mnasnet1_0": model("mnasnet_100"),
    "mnasnet0_5": model("mnasnet_050"),
    "regnet_x_400mf": model("regnetx_004_tv"),
    "regnet_x_w32_64_160_384_d1_2_7_12_g16": model("regnetx_004"),
    "regnet_y_400mf": model("regnety_004"),
    "xception": model("legacy_xception"),
    "mobilenet_v2": model("mobilenetv2_100"),
    "mobilenetv3_large_100": model("mobilenetv3_large_100"),
    "mobilenetv3_small_100": model("mobilenetv3_small_100"),
    "vgg11_timm": model("vgg11"),
    "vgg13_bn_timm": model("vgg13_bn"),
    "convnext_tiny": model("convnext_tiny"),
    "convnext_atto": model("convnext_atto"),
    "convnextv2_atto": model("convnextv2_atto"),
    "convnextv2_tiny": model("convnextv2_tiny"),
    "mobilenet_v2_x0_5": model("mobilenetv2_050"),
    "mixer_s_32": model("mixer_s32_224"),
    "resmlp_12": model("resmlp_12_224"),
    "repvgg_a0": model("repvgg_a0"),
    "repvgg_b1g4": model("repvgg_b1g4"),
    "repvgg_a0_deploy": joined("repvgg_a0"),
}
# The other sizes show more: features that strides don't divide, or several that are left for the mean.
SIZES = (
    dict.fromkeys((name for name in MODELS if "resne" in name or "repvgg" in name), 70)
    | {"vgg11_timm": 256, "vgg13_bn_timm": 64}
    | dict.fromkeys(("mobilenet_v2", "mobilenetv3_large_100", "xception"), 75)
    | dict.fromkeys((name for name in MODELS if name.startswith(("efficientnet", "tf_", "mnasnet", "regnet"))), 75)
)
NAMES = [pytest.param(name, marks=() if name in SMALLEST else pytest.mark.slow) for name in MODELS]


def check_logits(checkpoint, module):
    images = np.random.default_rng(0).random((2, *checkpoint.input_shape), np.float32)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        found, expected = np.asarray(checkpoint.model()(images)), module(as_torch(images)).numpy()
    assert expected.std() > 1e-2
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_timms(tmp_path, name):
    prefix = "module.backbone." if len(name) % 2 else ""  # some of either kind
    torch.manual_seed(0)
    module = randomise(MODELS[name](num_classes=CLASSES), seed=1)
    state = {prefix + key: value for key, value in module.state_dict().items()}
    torch.save({"model": state}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", image_size=SIZES.get(name))
    assert (checkpoint.architecture.name, checkpoint.num_classes) == (name, CLASSES)
    check_logits(checkpoint, module)
    save(checkpoint, tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth")["model"]
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


# Whose likes are compared above.
NAMED = {
    "efficientnet_b4": "efficientnet_b4",
    "efficientnet_b6": "efficientnet_b6_timm",
    "tf_efficientnet_b7": "efficientnet_b7_timm",
    "efficientnetv2_m": "tf_efficientnetv2_m",
    "tf_efficientnetv2_l": "tf_efficientnetv2_l",
    "regnetx_080": "regnet_x_8gf",
    "regnety_160": "regnet_y_16gf",
    "mnasnet_140": "mnasnet1_4",
    "resnetblur50": "resnet50",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_other_sizes_are_recognised(tmp_path, name):
    torch.save(timm.create_model(name, num_classes=CLASSES).state_dict(), tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == NAMED[name]


# Networks with the same names and shapes; clean images tell such ones apart (tests/models/test_look_alikes.py).
VARIANTS = ("efficientnetv2_s", "tf_efficientnet_b5")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path, name):
    module = randomise(quieter(name, num_classes=CLASSES), seed=1)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", model=name, image_size=75)
    check_logits(checkpoint, module)
    assert name in [one.name for one in load(tmp_path / "x.pth").alternatives]


@pytest.mark.slow
@pytest.mark.parametrize("size", [56, 64, 100])
def test_windows_that_do_not_divide_a_grid(tmp_path, size):
    options = {**SMALL_SWIN, "img_size": size}
    module = randomise(timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **options), seed=1)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", image_size=size)
    assert checkpoint.architecture.name == "swin_w32_d2_2_timm"
    check_logits(checkpoint, module)


@pytest.mark.slow
def test_convnext_with_scales_in_torchvisions_shape(tmp_path):
    module = randomise(timm.create_model("convnext_tiny", num_classes=CLASSES), seed=1)
    state = {
        key: value[:, None, None] if key.endswith("gamma") else value for key, value in module.state_dict().items()
    }
    torch.save(state, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", image_size=64)
    assert checkpoint.architecture.name == "convnext_tiny"
    check_logits(checkpoint, module)
