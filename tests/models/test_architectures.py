"""Every architecture against PyTorch: recognised from names and shapes, logits, input gradients, and the way back.

`pytest tests/models/test_architectures.py -m 'slow or not slow'` covers all of them and prints the table.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ibau_jax import UnlearnConfig, load, make_dataset, save, unlearn
from ibau_jax.checkpoints.conversion import leaf_shapes, torch_name, torch_shape
from ibau_jax.checkpoints.recognition import abstract_model
from ibau_jax.image_size import ImageSize
from ibau_jax.models import (
    architectures,
    cifar_efficientnet,
    cifar_shufflenet,
    densenet,
    dla,
    dpn,
    efficientnet,
    get_architecture,
    googlenet,
    inception,
    mnasnet,
    mobilenet,
    mobilenet_v1,
    pnasnet,
    xception,
)
from ibau_jax.training import initialise
from tests.oracles import torchvision_models  # noqa: F401 - before any architecture's `torch_module` imports torchvision
from tests.oracles.cifar_models import randomise, torch_oracle
from tests.oracles.timm_models import NAMES, TIMM
from tests.oracles.twins import as_torch, randomised

CLASSES = 7
# One small member of each family is enough for every run; the whole table takes minutes.
FAST = {
    "preact_resnet18",
    "resnet18_cifar",
    "resnet18_cifar_w16",
    "resnet_basic_1_2_1_1_small_stem_w8",
    "resnet18",
    "vgg11_bn_cifar",
    "wide_resnet16_1",
    "wide_resnet10_1_meliketoy",
    "wide_resnet10_1_deepmind",
    "mobilenet_v2_cifar",
    "small_vgg",
    "thin_resnet20",
    "thin_resnet20_w24_shortcut",
    "lenet",
    "lenet_nad",
    "mnist_examples",
    "mnist_backdoorbox",
    "mnist_input_aware",
    "mnist_wanet",
    "densenet_cifar_k4_1_2_1_1",
    "resnext11_2x2d_cifar",
    "mobilenet_v1_cifar",
    "shufflenet_v2_w16_32_64_d2_1_1_l32",
    "regnet_x_w16_32_d1_2_g8",
    "regnet_y_w8_24_d2_1_g12",
    "convnext_w16_32_d1_2",
    "convnextv2_w8_16_24_32_d1_2_1_1",
    "cait_w96_d2_c1_h4_p8",
    "swin_w32_d2_2",
    "regnet_cifar_1x16_2x16_1x32_1x48_g8_se",
    "repvgg_w16_16_32_d2_1_1_g2",
    "repvgg_w16_16_32_d2_1_1_deploy",
}
WIDE = {
    "wide_resnet28_10",
    "wide_resnet16_1",
    "wide_resnet16_8",
    "wide_resnet40_2",
    "wide_resnet40_4",
    "wide_resnet50_2",
}
# Sizes of a family whose other sizes are tried: each takes half a minute to compile.
LIKE_OTHERS = {
    "densenet161_small_stem",
    "densenet169_small_stem",
    "densenet201",
    "densenet201_small_stem",
    "dpn92_cifar",
    "efficientnet_b2",
    "efficientnet_b4",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "preact_resnet101_bn",
    "preact_resnet152",
    "preact_resnet152_bn",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "shufflenet_v2_x1_5_cifar",
}
# tests/models/test_timm.py has them.
OF_TIMM = ("_timm", "mobilenetv3_large_100", "mobilenetv3_small_100", *(f"efficientnetv2_{size}" for size in "sml"))
COVERED = [
    architecture.name
    for architecture in architectures()
    if architecture.variant_of is None
    and architecture.name not in LIKE_OTHERS
    and not architecture.name.endswith(OF_TIMM)
    and (not architecture.name.startswith("wide_resnet") or architecture.name in WIDE)
]  # tests/models/test_look_alikes.py has the variants
COVERED += [
    "regnetx_200mf_cifar",
    "regnetx_400mf_cifar",
    "regnety_400mf_cifar",
    "regnet_cifar_1x16_2x16_1x32_1x48_g8_se",
    "resnet18_cifar_w16",
    "resnet18_cifar_w16_32_48_64",
    "resnet18_small_stem_w16_24_24_40",
    "resnet_bottleneck_1_2_1_1_cifar_w8_12_24_16",
    "resnet18_cifar_64_w16",
    "resnet_basic_1_2_1_1_small_stem_w8",
    "resnet_bottleneck_1_2_1_1_cifar_w24",
    "resnet10",
    "resnet26",
    "resnet14_small_stem",
    "wide_resnet26_2_small_stem",
    "resnext26_32x4d",
    *NAMES,
    "wide_resnet16_7",
    "wide_resnet46_1",
    "wide_resnet10_1_meliketoy",
    "wide_resnet28_4_meliketoy",
    "wide_resnet10_1_deepmind",
    "wide_resnet28_2_deepmind",
]
COVERED += ["thin_resnet20", "thin_resnet32_downsample_fc", "thin_resnet20_w24_shortcut", "thin_resnet110", "vit_b_32"]
COVERED += ["densenet_cifar", "densenet121_cifar", "densenet161_cifar", "densenet_cifar_k4_1_2_1_1"]
COVERED += ["resnext29_2x64d_cifar", "resnext29_32x4d_cifar", "resnext20_4x6d_cifar", "resnext11_2x2d_cifar"]
COVERED += ["vgg11_bn_cifar_w512", "vgg16_bn_cifar_w4096", "vgg13_cifar_w48"]
COVERED += ["mobilenet_v2_x0_5", "mobilenet_v2_x1_4", "mobilenet_v2_x0_37", "mnasnet0_5", "mnasnet1_3"]
COVERED += ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x2_0", "shufflenet_v2_w16_32_64_d2_1_1_l32"]
COVERED += ["regnet_x_400mf", "regnet_x_8gf", "regnet_y_400mf", "regnet_x_w16_32_d1_2_g8", "regnet_y_w8_24_d2_1_g12"]
COVERED += ["convnext_tiny", "convnext_base", "convnext_w16_32_d1_2"]
COVERED += ["swin_w32_d2_2", "swin_w48_d1_3_1_h4_4_8_p2", "swin_t"]
COVERED += ["repvgg_w16_16_32_d2_1_1_g2", "repvgg_w16_16_32_d2_1_1_deploy", "repvgg_a0", "repvgg_b1g4"]
COVERED += ["repvgg_a0_stride8", "repvgg_a2"]
# An unlearning round on the smallest member of each family.
FAMILIES = (
    "repvgg_w16_16_32_d2_1_1_g2",
    "vit_w128_d2_p8_distilled",
    "vit_w128_d2_p16_deit3",
    "cait_w96_d2_c1_h4_p8",
    "swin_w32_d2_2",
    "mixer_w64_d2_p8",
    "resmlp_w64_d2_p8",
    "googlenet_small_stem",
    "inception_v3_small_stem",
    "shufflenet_v2_x0_5_cifar",
    "shufflenet_g2_cifar",
    "regnet_cifar_1x16_2x16_1x32_1x48_g8_se",
    "dpn26_cifar",
    "dla_cifar",
    "pnasnet_b_cifar",
    "small_vgg",
    "thin_resnet20",
    "preact_resnet18",
    "resnet18_cifar",
    "vgg11_bn_cifar",
    "wide_resnet16_1",
    "wide_resnet10_1_meliketoy",
    "wide_resnet10_1_deepmind",
    "resnet18_cifar_w16",
    "mobilenet_v2",
    "mobilenet_v2_cifar",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "mobilenet_v2_x0_5",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "tf_efficientnetv2_s",
    "xception",
    "convnext_w16_32_d1_2",
    "convnextv2_w8_16_24_32_d1_2_1_1",
    "mnasnet0_5",
    "regnet_y_w8_24_d2_1_g12",
    "shufflenet_v2_w16_32_64_d2_1_1_l32",
    "vit_w128_d2_p8",
    "densenet_cifar_k4_1_2_1_1",
    "resnext11_2x2d_cifar",
    "senet18",
    "mobilenet_v1_cifar",
    "efficientnet_b0_cifar",
)
# The last pooling has windows of a size that small images have.
POOLED_BY_WINDOWS = (
    "densenet_cifar_k4_1_2_1_1",
    "resnext11_2x2d_cifar",
    "senet18",
    "mobilenet_v1_cifar",
    "vgg11_bn_cifar_w512",
)
SHORT_V2 = [
    (efficientnet, "V2", {"v2_s": (tuple(one._replace(blocks=1) for one in efficientnet.V2["v2_s"][0][:4]), 384)})
]
# With fewer blocks where compiling all of them, which are alike, takes minutes.
SHORTER = {
    "googlenet_small_stem": [(googlenet, "BLOCKS", dict(list(googlenet.BLOCKS.items())[::4]))],
    "inception_v3_small_stem": [(inception, "BLOCKS", dict(list(inception.BLOCKS.items())[::3]))],
    "shufflenet_v2_x0_5_cifar": [(cifar_shufflenet, "BLOCKS", (2, 1, 1))],
    "shufflenet_g2_cifar": [(cifar_shufflenet, "BLOCKS", (2, 1, 1))],
    "dpn26_cifar": [(dpn, "STAGES", dpn.STAGES[:2]), (dpn, "BLOCKS", {26: (1, 2)})],
    "dla_cifar": [(dla, "TREES", dla.TREES[:2])],
    "pnasnet_b_cifar": [(pnasnet, "CELLS", 1)],
    "densenet121": [(densenet, "CONFIGURATIONS", {121: (32, (1, 2), 64)})],
    "efficientnet_b0": [(efficientnet, "STAGES", efficientnet.STAGES[:3])],
    "efficientnet_v2_s": SHORT_V2,
    "tf_efficientnetv2_s": SHORT_V2,
    "xception": [(xception, "BLOCKS", xception.BLOCKS[:2])],
    "mnasnet0_5": [(mnasnet, "STAGES", ((3, 3, 2, 24, 1), (6, 5, 2, 40, 1)))],
    "mobilenet_v2": [(mobilenet, "V2_STAGES", ((1, 16, 1, 1), (6, 24, 2, 2)))],
    "mobilenet_v2_x0_5": [(mobilenet, "V2_STAGES", ((1, 16, 1, 1), (6, 24, 2, 2)))],
    "mobilenet_v2_cifar": [(mobilenet, "V2_CIFAR_STAGES", ((1, 16, 1, 1), (6, 24, 2, 1)))],
    "vit_w128_d2_p8": [],
    "efficientnet_b0_cifar": [(cifar_efficientnet, "STAGES", efficientnet.STAGES[:3])],
    "mobilenet_v1_cifar": [(mobilenet_v1, "BLOCKS", ((64, 2), (128, 2), (128, 2), (128, 2)))],
    "mobilenet_v3_large": [(mobilenet, "V3_SIZES", {"large": (mobilenet.V3_LARGE[::6], 1280)})],
    "mobilenet_v3_small": [(mobilenet, "V3_SIZES", {"small": (mobilenet.V3_SMALL[::4], 1024)})],
    "vit_w128_d2_p8_distilled": [],
    "vit_w128_d2_p16_deit3": [],
    "cait_w96_d2_c1_h4_p8": [],
    "mixer_w64_d2_p8": [],
    "resmlp_w64_d2_p8": [],
}
# Of large maps so many values are rounded that in most images one of them is on the other side of a ReLU.
JUMPING = ("googlenet_small_stem", "googlenet_cifar", "inception_v3_small_stem", "pnasnet_b_cifar")
SIZE, IMAGES = 32, 6
SMALLEST_IMAGES = {"alexnet": 70, "inception_v3": 80}


@pytest.fixture(autouse=True)
def compiled_programs_are_forgotten():
    """All of them together take gigabytes."""
    yield
    jax.clear_caches()


def slow_unless(names, fast):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def tried_size(name):
    """Adaptive pooling takes any size; smaller images are sooner done, and 40 leaves odd sizes to every stride."""
    size = get_architecture(name).image_sizes[0].height
    return size if name.startswith("vit") or size <= 64 else SMALLEST_IMAGES.get(name, 40)


def torch_model(name, size):
    architecture = get_architecture(name)
    torch.manual_seed(0)
    make = architecture.torch_module or TIMM.get(name)
    return randomise(make(CLASSES) if make else torch_oracle(name, CLASSES, size), seed=1)


def relative(found, expected):
    """‖a − b‖ / ‖b‖ for each image."""
    axes = tuple(range(1, expected.ndim))
    return np.sqrt(np.sum((found - expected) ** 2, axes) / np.sum(expected**2, axes))


def in_flax(checkpoint, images, direction, dtype):
    """Logits, and the gradient of logits · direction by the images."""
    graph, state = nnx.split(checkpoint.model())
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)

    def along(images, state):
        logits = nnx.merge(graph, state)(images)
        return jnp.sum(logits * direction), logits

    with jax.default_matmul_precision("highest"):
        arguments = (jnp.asarray(images, dtype), state)
        (_, logits), gradient = jax.jit(jax.value_and_grad(along, has_aux=True))(*arguments)
    return np.asarray(logits), np.asarray(gradient)


def in_torch(module, images, direction):
    """The same by PyTorch."""
    inputs = as_torch(images).requires_grad_(True)
    logits = module(inputs)
    (logits * torch.as_tensor(direction)).sum().backward()
    return logits.detach().numpy(), inputs.grad.numpy().transpose(0, 2, 3, 1)


def differences(checkpoint, module, size, dtype=np.float32):
    """How far logits and input gradients are from PyTorch's, image by image."""
    rng = np.random.default_rng(0)
    images, direction = (
        rng.random((IMAGES, size, size, checkpoint.architecture.channels)),
        rng.normal(size=(IMAGES, CLASSES)),
    )
    arguments = (images.astype(dtype), direction.astype(dtype))
    found, expected = in_flax(checkpoint, *arguments, dtype), in_torch(module, *arguments)
    assert expected[0].std() > 1e-3  # a constant output would agree with anything
    return tuple(map(relative, found, expected))


@pytest.fixture
def compiled_to_suit(name, request):
    """Quickly, unless there is more to compute than to compile: a ViT-B/16, always at 224 pixels, and VGGs' layers."""
    if not name.startswith(("vit", "vgg")):
        request.getfixturevalue("compiled_quickly")


@pytest.mark.usefixtures("compiled_to_suit")
@pytest.mark.parametrize("name", slow_unless(COVERED, FAST))
def test_architecture(name, tmp_path, conversion_table):
    size = tried_size(name)
    module = torch_model(name, size)
    torch.save({"net": module.state_dict(), "acc": 50.0}, tmp_path / "x.pth")
    start = time.perf_counter()
    checkpoint = load(tmp_path / "x.pth", image_size=size)
    seconds = time.perf_counter() - start
    assert (checkpoint.architecture.name, checkpoint.num_classes) == (name, CLASSES)

    logits_off, gradient_off = differences(checkpoint, module, size)
    save(checkpoint, tmp_path / "y.pth")
    state, back = module.state_dict(), torch.load(tmp_path / "y.pth", weights_only=True)["net"]
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)
    parameters = sum(map(torch.numel, module.parameters()))
    differ = map(float, (logits_off.max(), np.median(gradient_off), gradient_off.max()))
    conversion_table(name, size, parameters, *differ, seconds)
    assert logits_off.max() <= 1e-4
    # The median of the images: in some, rounding puts a feature on the other side of a ReLU or of a maximum, in either
    # framework, and their gradients jump. The next test looks at such images with finer rounding.
    assert name in JUMPING or np.median(gradient_off) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet34_cifar_64", "vgg16_bn_cifar_3", *JUMPING])
def test_gradients_that_jump_in_float32_agree_in_float64(name, tmp_path):
    size = tried_size(name)
    module = torch_model(name, size)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    with jax.enable_x64(True):
        logits_off, gradient_off = differences(load(tmp_path / "x.pth"), module.double(), size, np.float64)
    assert logits_off.max() <= 1e-12
    assert gradient_off.max() <= 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("name", POOLED_BY_WINDOWS)
def test_the_classifier_tells_how_large_the_images_are(name, tmp_path):
    """Of 64x64 images the last pooling leaves four places, not one."""
    module = torch_model(name, 64)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert (checkpoint.architecture.name, checkpoint.input_shape) == (name, (64, 64, 3))
    logits_off, gradient_off = differences(checkpoint, module, 64)
    assert logits_off.max() <= 1e-4
    assert np.median(gradient_off) <= 1e-3


@pytest.mark.slow
def test_no_two_architectures_have_the_same_state_dict():
    """Else names and shapes could not tell them apart."""
    seen = {}
    for architecture in (one for one in architectures() if one.variant_of is None):
        size = architecture.image_sizes[0]
        shapes = leaf_shapes(abstract_model(architecture, CLASSES, size))
        names = frozenset((torch_name(path), torch_shape(path, shape)) for path, shape in shapes.items())
        assert names not in seen, (architecture.name, seen[names])
        seen[names] = architecture.name
        assert set(architecture.landmarks.items()) <= names, architecture.name
        assert any(name == architecture.classifier for name, _ in names)


def shortened(name, monkeypatch, rng):
    architecture = get_architecture(name)  # of a family, it is remembered as it is first made
    for module, constant, value in SHORTER[name]:
        monkeypatch.setattr(module, constant, value)
    model = architecture.build(CLASSES, ImageSize(SIZE, SIZE), nnx.Rngs(0))
    initialise(model, 0)
    return randomised(model, rng)


def converted(name, folder):
    torch.save(torch_model(name, SIZE).state_dict(), folder / "x.pth")
    return load(folder / "x.pth", image_size=SIZE).model()


@pytest.mark.parametrize("name", slow_unless(FAMILIES, {"wide_resnet16_1"}))
def test_an_unlearning_round(name, tmp_path, monkeypatch, rng, compiled_quickly):
    model = shortened(name, monkeypatch, rng) if name in SHORTER else converted(name, tmp_path)
    data = make_dataset(rng.random((4, SIZE, SIZE, 3), np.float32), rng.integers(0, CLASSES, 4), "tiny")
    config = UnlearnConfig(n_rounds=1, batch_size=2, K=2, inner_optim="sgd", inner_lr=0.1, lr=1e-4, portion=0.5)
    result = unlearn(model, data, config)
    assert result.status == "completed"
    assert np.isfinite([result.rounds[0].inner_loss, result.rounds[0].outer_loss]).all()
    assert result.rounds[0].perturbation_norm > 0
    before, after = (dict(nnx.to_flat_state(nnx.state(one))) for one in (model, result.model))
    statistics = [path for path in before if path[-1] in ("mean", "var")]
    parameters = [path for path in before if path not in statistics]
    assert all(np.array_equal(before[path][...], after[path][...]) for path in statistics)
    moved = [not np.array_equal(before[path][...], after[path][...]) for path in parameters]
    assert np.mean(moved) > 0.9
