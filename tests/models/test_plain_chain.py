"""Plain chains: hand-written PyTorch networks are read from names and shapes, and clean images choose."""

import re
import time

import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ibau_jax import UnlearnConfig, load, make_dataset, save, settle, unlearn
from ibau_jax.checkpoints.variants import check_evidence, weigh
from ibau_jax.errors import CheckpointError
from ibau_jax.models import get_architecture, proposed, variants
from tests.cli.commands import CONVERT, run
from tests.oracles.cifar_models import randomise
from tests.oracles.plain_chains import CHAINS, Mlp, VggLike, lenet5
from tests.oracles.twins import as_torch

# Images of these sizes are not the first that their weights fit.
SIZES = {"lenet96": 96, "cifar64": 64}
# How often the true network is taken without images, and by clean ones: docs/converting.md has the figures.
ASSUMED = set(CHAINS) - {"all_convolutional", "averaged", "unpadded", "strided_grey"}
QUICK = {"strided_grey"}
TRIED = ("strided_grey", "mnist_tutorial", "blocks", "averaged")  # benchmarks.plain_chains --written tries all of them


def saved(module, path):
    torch.save(module.state_dict(), path)
    return path


def made(name):
    torch.manual_seed(0)
    return randomise(CHAINS[name][0](), seed=1).eval()


def shapes_of(module):
    counted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return {name: shape for name, shape in counted.items() if not name.endswith("num_batches_tracked")}


def names_of(checkpoint):
    return [checkpoint.architecture.name, *(one.name for one in checkpoint.alternatives)]


def assert_alike(checkpoint, module, rng):
    """The same logits but for a constant, as log-softmax takes it away from each image's."""
    images = rng.random((3, *checkpoint.input_shape), np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected, found = module(as_torch(images)).numpy(), np.asarray(checkpoint.model()(images))
    expected, found = (one - one.mean(1, keepdims=True) for one in (expected, found))
    assert expected.std() > 1e-4
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_recognised_and_computes_what_pytorch_does(name, tmp_path, rng):
    module, true = made(name), CHAINS[name][1]
    checkpoint = load(saved(module, tmp_path / "x.pth"), image_size=SIZES.get(name))
    base, place = true.split("+")[0], names_of(checkpoint)
    assert base in place
    assert (place[0] == base) == (name in ASSUMED)
    assert len(place) <= 24
    named = load(tmp_path / "x.pth", model=true)
    assert named.alternatives == ()
    assert_alike(named, module, rng)
    save(named, tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth", weights_only=True)
    assert list(back) == list(module.state_dict())
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


SIGNS = (1, 2, 3, 4, 5, 10, 12, 13, 25, 38)  # of GTSRB, ten with many images


def signs(shared, shape):
    """Real images in any size, grey or not, in a random order; bytes."""
    stored = np.load(shared / "data" / "gtsrb_train_12k.npz")
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(stored["y"], SIGNS)))
    pixels = as_torch(stored["x"][chosen]).float()
    pixels = pixels.mean(1, keepdim=True) if shape[2] == 1 else pixels
    resized = nn.functional.interpolate(pixels, shape[:2], mode="bilinear", antialias=True).round().clamp(0, 255)
    labels = np.searchsorted(SIGNS, stored["y"][chosen])
    return make_dataset(resized.to(torch.uint8).permute(0, 2, 3, 1).numpy().copy(), labels, "signs")


def trained(module, images, labels, steps=400):
    """A few seconds of Adam, in training mode, so that BatchNorm records."""
    torch.manual_seed(0)
    optimizer, rng = torch.optim.Adam(module.train().parameters(), 2e-3), np.random.default_rng(0)
    inputs, classes = as_torch(images.astype(np.float32) / 255), torch.as_tensor(labels.astype(np.int64))
    for _ in range(steps):
        batch = torch.as_tensor(rng.choice(len(classes), 64))
        loss = nn.functional.cross_entropy(module(inputs[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TRIED]
)
def test_clean_images_choose_the_true_chain_or_none(name, shared, tmp_path):
    """An activation is at times taken for one like it; what stands where is not."""
    true = get_architecture(CHAINS[name][1])
    size = true.image_sizes[0].height
    images = signs(shared, (size, size, true.channels))
    held_out = 2000
    torch.manual_seed(0)
    module = trained(CHAINS[name][0](), images.images[held_out:], images.labels[held_out:])
    checkpoint = load(saved(module, tmp_path / "x.pth"), image_size=SIZES.get(name))
    evidence = weigh(checkpoint, images.first(held_out), None)
    print(name, *map(str, evidence[:4]), sep="\n    ")
    try:
        check_evidence(evidence)
    except CheckpointError as error:
        assert "apart" in str(error)
        assert true.name in str(error)
        assert name not in QUICK
    else:
        assert evidence[0].architecture.name.split("+")[0] == true.name.split("+")[0]


def test_the_wrong_images_do_not_choose(tmp_path, rng):
    """Labels that say nothing of the images leave all candidates at chance."""
    checkpoint = load(saved(made("mnist_tutorial"), tmp_path / "x.pth"))
    images = make_dataset(rng.random((200, 28, 28, 1), np.float32), rng.integers(0, 10, 200), "noise")
    with pytest.raises(CheckpointError, match="better than chance"):
        settle(checkpoint, images)


def test_a_chain_without_alternatives_is_checked_too(tmp_path, rng):
    checkpoint = load(saved(made("mlp_rgb"), tmp_path / "x.pth"))
    images = make_dataset(rng.random((100, 32, 32, 3), np.float32), rng.integers(0, 10, 100), "noise")
    with pytest.raises(CheckpointError, match="better than chance"):
        settle(checkpoint, images)


def test_what_images_do_not_tell_apart_is_no_choice(tmp_path):
    """Black images with one label are classified alike by all."""
    module = made("strided_grey")
    with torch.no_grad():
        module.fc.weight[:] = 0
        module.fc.bias[:] = torch.arange(10.0)
    checkpoint = load(saved(module, tmp_path / "x.pth"))
    labels = np.full(50, 9)
    labels[0] = 0
    images = make_dataset(np.zeros((50, 28, 28, 1), np.float32), labels, "black")
    with pytest.raises(CheckpointError, match="chance|apart"):
        settle(checkpoint, images)


@pytest.mark.parametrize(
    ("extra", "shape"),
    [
        ("attention", (16, 16)),
        ("scale", (16,)),
        ("conv1.mask", (10, 1, 5, 5)),
        ("conv3.weight", (20, 20, 3, 3)),
        ("gate.weight", (1,)),
    ],
)
def test_what_a_chain_has_no_place_for_makes_it_unknown(extra, shape, tmp_path):
    state = {**made("mnist_tutorial").state_dict(), extra: torch.ones(shape)}
    if extra == "conv3.weight":  # a branch: it takes what conv2 gives, and nothing takes what it gives
        state["fc1.weight"] = torch.ones(50, 321)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="unknown architecture|beside"):
        load(tmp_path / "x.pth")


def test_features_without_their_head_are_no_chain():
    assert not proposed(shapes_of(VggLike().features))


@pytest.mark.parametrize("name", ["lenet", "mnist_examples", "mnist_wanet", "vgg11_bn_cifar", "small_vgg"])
def test_a_published_network_is_preferred(name, tmp_path, rng):
    from tests.models.test_architectures import torch_model

    size = get_architecture(name).image_sizes[0].height
    torch.save({"net": torch_model(name, size).state_dict()}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == name


@pytest.mark.parametrize("prefix", ["module.", "model.", "model.net."])
def test_wrappers_leave_the_name_as_it_is(prefix, tmp_path):
    module = made("blocks")
    torch.save(
        {"state_dict": {prefix + name: value for name, value in module.state_dict().items()}}, tmp_path / "x.pth"
    )
    assert load(tmp_path / "x.pth").architecture.name == CHAINS["blocks"][1]


def test_a_flax_folder_keeps_the_candidates(tmp_path):
    checkpoint = load(saved(made("unpadded"), tmp_path / "x.pth"))
    save(checkpoint, tmp_path / "flax")
    again = load(tmp_path / "flax")
    assert names_of(again) == names_of(checkpoint)
    assert "--image-size" in again.assumption_note()
    for architecture in again.alternatives:
        assert variants(architecture) == variants(again.architecture)


def test_averaged_maps_take_images_of_any_size(tmp_path):
    path = saved(made("averaged"), tmp_path / "x.pth")
    assert load(path, image_size=50).image_size == (50, 50)
    small = load(path, image_size=6)
    images = np.zeros((1, 6, 6, 3), np.float32)
    assert all(np.isfinite(small.as_variant(one).model()(images)).all() for one in small.alternatives)


@pytest.mark.parametrize("name", ["cifar64", "lenet5", "norm_behind_relu", "pairs_grey"])
def test_a_whole_module_says_strides_paddings_and_poolings(name, tmp_path, rng):
    module = made(name)
    torch.save(module, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", image_size=SIZES.get(name))
    candidates = [checkpoint.architecture, *checkpoint.alternatives]
    assert CHAINS[name][1] in names_of(checkpoint)
    assert len(candidates) < len(variants(checkpoint.architecture))
    for steps in (one.name.split("-") for one in candidates):
        assert [step for step in steps if "_k" in step] == [step for step in CHAINS[name][1].split("-") if "_k" in step]


def test_a_whole_module_says_averages_and_activations(tmp_path, rng):
    module = lenet5(nn.Tanh, nn.AvgPool2d)
    torch.save(module, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert checkpoint.architecture.name.endswith("+tanh+avg_pool")
    assert_alike(checkpoint, module, rng)


def test_a_whole_module_with_other_layers_is_refused(tmp_path):
    torch.save(lenet5(nn.Softplus, nn.MaxPool2d), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="Softplus"):
        load(tmp_path / "x.pth")


def test_numbers_of_a_sequential_say_what_is_pooled(tmp_path):
    """An irregular network: its numbers leave room for poolings behind the first and the fourth convolution alone."""
    widths, layers, before = (8, 16, 16, 16, 32, 32), [], 3
    for place, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if place in (0, 3) else []
        before = width
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10))
    first = load(saved(module, tmp_path / "x.pth")).architecture.name
    assert [step for step in first.split("-") if "=" not in step or "_k" in step] == [
        *("chain3x32", "0=8_k3_p1", "relu", "max2", "4=16_k3_p1", "relu", "7=16_k3_p1", "relu", "10=16_k3_p1", "relu"),
        *("max2", "14=32_k3_p1", "relu", "17=32_k3_p1", "relu", "flat"),
    ]


def test_what_statistics_do_not_tell_apart_are_both_candidates(tmp_path):
    """Pooled or not behind the last BatchNorm, before the average over all places."""
    checkpoint = load(saved(made("averaged"), tmp_path / "x.pth"))
    names = names_of(checkpoint)
    unpooled = [name for name in names if "=norm-relu-mean1" in name and "max2" in name]
    assert len(unpooled) > 2
    assert sum(name.replace("-mean1", "-max2-mean1") in names for name in unpooled) >= len(unpooled) - 1


def test_another_chain_can_be_written_by_hand(tmp_path, rng):
    """Pooling by 3x3 with stride 2, sigmoid, an average: nothing of it is among the candidates."""
    module = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 16, 3, stride=2), nn.SiLU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(144, 5)),
    )
    name = "chain3x32-0=8_k3_p1-sigmoid-max3_s2_p1-3=16_k3_s2-silu-avg2-flat-7=classes"
    assert_alike(load(saved(module, tmp_path / "x.pth"), model=name), module, rng)


@pytest.mark.parametrize(
    "name",
    [
        "chain3x32-a=8_k3-relu-flat-b=5",  # no classes
        "chain3x32-a=8_k3-relu-b=classes",  # no flat
        "chain3x32-flat-a=8_k3-b=classes",  # a convolution behind it
        "chain3x32-flat-a=8-a=classes",  # twice
        "chain3x32-flat-a=8-a.b=classes",  # a layer in a layer
        "chain3x32-flat-__call__=8-b=classes",
        "chain3x32-flat-a=8_s2-b=classes",
        "chain3x32-flat-what-b=classes",
        "chain2x32-flat-b=classes",
    ],
)
def test_what_is_no_chain_is_no_model(name):
    with pytest.raises(CheckpointError, match="there is no model"):
        get_architecture(name)


def test_names_are_safe_for_shells_files_and_alterations():
    for _, name in CHAINS.values():
        assert re.fullmatch(r"[A-Za-z0-9_.=-]+(\+[a-z0-9_.]+)*", name)
        assert len(name) < 1000


def test_hostile_state_dicts_take_no_time():
    many = {f"l{number}.weight": (8, 3 if number == 0 else 8, 3, 3) for number in range(100_000)}
    deep = {f"{number}.weight": (64, 3 if number == 0 else 64, 3, 3) for number in range(39)} | {"fc.weight": (10, 64)}
    wide = {"a.weight": (99_999_999, 3, 3, 3), "b.weight": (10, 99_999_999 * 10**12)}
    start = time.perf_counter()
    for shapes in (many, deep, wide):
        found = proposed(shapes)
        assert all(len(variants(one)) <= 24 for one in found)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["blocks"])
def test_an_unlearning_round(name, tmp_path, rng, compiled_quickly):
    checkpoint = load(saved(made(name), tmp_path / "x.pth"))
    data = make_dataset(rng.random((4, *checkpoint.input_shape), np.float32), rng.integers(0, 10, 4), "tiny")
    config = UnlearnConfig(n_rounds=1, batch_size=2, K=2, inner_optim="sgd", inner_lr=0.1, lr=1e-4, portion=0.5)
    result = unlearn(checkpoint.as_variant(checkpoint.architecture).model(), data, config)
    assert result.status == "completed"
    assert result.rounds[0].perturbation_norm > 0


@st.composite
def plain_chains(draw):
    """A random regular network, as people write them."""
    grey, normalized, sequential = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    size = 28 if grey else 32
    count, kernel = draw(st.integers(1, 4)), draw(st.sampled_from((3, 5)))
    padding = draw(st.sampled_from((0, kernel // 2)))
    halving = draw(st.sampled_from(("each", "second", "last", "strided")))
    widths = [draw(st.sampled_from((8, 12))) * 2**place for place in range(count)]
    layers, before, side = [], 1 if grey else 3, size
    for place, width in enumerate(widths):
        stride = 2 if halving == "strided" else 1
        layers.append(nn.Conv2d(before, width, kernel, stride, padding, bias=not normalized))
        layers += [nn.BatchNorm2d(width)] if normalized else []
        layers.append(nn.ReLU())
        side, before = (side + 2 * padding - kernel) // stride + 1, width
        if halving == "each" or (halving == "second" and place % 2) or (halving == "last" and place == count - 1):
            layers.append(nn.MaxPool2d(2))
            side //= 2
        if side < 2:
            return draw(st.nothing())
    layers += [nn.Flatten(), nn.Linear(before * side**2, 16), nn.ReLU(), nn.Linear(16, 10)]
    if sequential:
        return size, nn.Sequential(*layers)
    named = nn.Module()
    for place, layer in enumerate(layers):
        named.add_module(f"layer{place}_{type(layer).__name__}", layer)
    named.forward = nn.Sequential(*layers).forward
    return size, named


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(plain_chains())
@pytest.mark.slow
def test_random_chains_are_among_the_candidates(tmp_path_factory, drawn):
    size, module = drawn
    module = randomise(module, seed=1).eval()
    path = saved(module, tmp_path_factory.mktemp("chain") / "x.pth")
    checkpoint = load(path, image_size=size)
    rng = np.random.default_rng(0)
    images = rng.random((2, *checkpoint.input_shape), np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = module(as_torch(images)).numpy()
        for one in (checkpoint.architecture, *checkpoint.alternatives):
            found = np.asarray(checkpoint.as_variant(one).model()(images))
            if np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected):
                return
    raise AssertionError(f"{module} is none of {names_of(checkpoint)}")


def test_an_mlp_of_no_image_is_no_chain():
    assert not proposed(shapes_of(Mlp(100, False)))


def test_a_name_settles_what_images_do_not(tmp_path):
    """The command stops where clean images do not tell, and goes on with the network that --model names."""
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, 2))
    with torch.no_grad():
        for value in module.parameters():
            value[:] = 0
        module[0].weight[:] = 1
        module[4].weight[1] = 1
        module[4].bias[1] = -98
    path = saved(module, tmp_path / "x.pth")
    bright = np.arange(100) % 2
    images = np.broadcast_to(np.where(bright, 200, 50)[:, None, None, None], (100, 28, 28, 1)).astype(np.uint8)
    images[:, :, 0] = 0
    np.savez(tmp_path / "clean.npz", x=images, y=bright)
    arguments = [*CONVERT, path, tmp_path / "flax", "--dataset", tmp_path / "clean.npz"]
    stopped = run(*arguments, cwd=tmp_path)
    assert stopped.returncode == 2
    assert "apart" in stopped.stderr
    named = run(*arguments, "--model", "chain1x28-0=1_k1-relu-max2-flat-4=classes", cwd=tmp_path)
    assert named.returncode == 0, named.stderr
