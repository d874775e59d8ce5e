"""A network among other tensors: found as a sub-tree of the names, the rest kept; what may belong to it is not ignored."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from ibau_jax import load, save
from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import CheckpointError
from tests.checkpoints.test_conversion import assert_same_tree, random_vgg
from tests.oracles.cifar_models import WideResNet, WideStage, randomise
from tests.oracles.torchvision_models import models
from tests.oracles.twins import as_torch
from tests.oracles.wrapped import Normalize

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def state(seed=0, prefix=""):
    return OrderedDict((prefix + name, tensor) for name, tensor in random_vgg(10, seed).state_dict().items())


def wide(prefix=""):
    module = randomise(WideResNet(10, 1, 10), 0)
    return OrderedDict((prefix + name, tensor) for name, tensor in module.state_dict().items())


def round_trip(tree, folder, **options):
    """The checkpoint, after comparing everything that comes back with what torch saved, through a Flax folder too."""
    torch.save(tree, folder / "x.pth")
    checkpoint = load(folder / "x.pth", **options)
    save(checkpoint, folder / "y.pth")
    save(checkpoint, folder / "flax")
    save(load(folder / "flax"), folder / "z.pth")
    for name in ("y.pth", "z.pth"):
        assert_same_tree(torch.load(folder / name, weights_only=True), tree)
    return checkpoint


BESIDE = {
    "weights of a loss": (state(prefix="model."), {"criterion.weight": torch.ones(10)}),
    "a temperature behind no prefix": (state(), {"temperature": torch.ones(1), "loss.pos_weight": torch.ones(10)}),
    "centres of a loss": (state(prefix="net."), {"center_loss.centers": torch.ones(10, 2048)}),
    "a metric's state": (state(prefix="model."), {"val_acc.confmat": torch.ones(10, 10, dtype=torch.int64)}),
    "another network": (state(prefix="classifier."), {"generator.0.weight": torch.ones(5, 3, 3, 3)}),
    "the smaller part": (state(prefix="netC."), {f"netG.{i}.weight": torch.ones(4, 3, 3, 3) for i in range(90)}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_the_network_is_kept_and_named(tmp_path, name):
    network, beside = BESIDE[name]
    tree = {"state_dict": OrderedDict([*network.items(), *beside.items()]), "epoch": 3}
    checkpoint = round_trip(tree, tmp_path)
    assert checkpoint.architecture.name == "small_vgg"
    assert all(other in checkpoint.beside_note() for other in list(beside)[:20])
    assert set(inspect_file(tmp_path / "x.pth", Request()).beside) == set(beside)
    assert verify(checkpoint, tmp_path / "x.pth") <= 1e-5


NORM = ("weight", "bias", "running_mean", "running_var")
DOUBTFUL = {
    "attention in a block": (wide(), {"block1.layer.0.se.fc.weight": torch.ones(4, 16)}, "1 unexpected"),
    "a layer beside the others": (wide(), {"attention.weight": torch.ones(64, 64)}, "--leave-out attention.weight"),
    "a last BatchNorm": (wide("model."), {f"model.bn.{n}": torch.ones(64) for n in NORM}, "--leave-out model.bn"),
    "a layer in its sub-tree": (wide("model."), {"model.attention.weight": torch.ones(8, 64)}, "--leave-out model.att"),
    "a second head": (wide(), {"rotation.weight": torch.ones(4, 64)}, "--leave-out rotation.weight"),
    "a head on the output": (wide("encoder."), {"head.weight": torch.ones(4, 10)}, "--leave-out head.weight"),
    "a layer before it": (wide("1."), {"0.weight": torch.ones(3, 3, 3, 3), "0.bias": torch.ones(3)}, "--leave-out 0"),
    "its input's BatchNorm": (wide(), {f"input_bn.{n}": torch.ones(3) for n in NORM}, "--leave-out input_bn"),
    "its output's BatchNorm": (wide("0."), {f"1.{n}": torch.ones(10) for n in NORM}, "--leave-out 1"),
    "grey to colours": (wide("net."), {"to_rgb.weight": torch.ones(3, 1, 1, 1)}, "--leave-out to_rgb.weight"),
    "another normalisation": (
        wide("net."),
        {"norm.mean": torch.ones(3), "norm.istd": torch.ones(3)},
        "--leave-out norm",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_may_take_part_in_the_computation_is_not_ignored(tmp_path, name):
    network, other, message = DOUBTFUL[name]
    torch.save(OrderedDict([*network.items(), *other.items()]), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x.pth")
    report = inspect_file(tmp_path / "x.pth", Request())
    assert message in report.problem


def test_tensors_are_left_out_on_request(tmp_path):
    network, other, _ = DOUBTFUL["a layer beside the others"]
    tree = OrderedDict([*network.items(), *other.items()])
    assert round_trip(tree, tmp_path, leave_out=("attention",)).architecture.name == "wide_resnet10_1"


def with_unused_group(classes=10):
    """TRADES' Wide ResNet, whose second first group takes no part in the computation."""
    module = WideResNet(10, 1, classes)
    module.sub_block1 = WideStage(1, 16, 16, 1)
    return randomise(module, 0)


@pytest.mark.parametrize(("prefix", "classifier"), [("", "fc"), ("module.", "fc.1"), ("model.net.", "head")])
def test_layers_that_inference_does_not_use_are_kept(tmp_path, prefix, classifier):
    state = with_unused_group().state_dict()
    tree = OrderedDict((prefix + name.replace("fc", classifier), value) for name, value in state.items())
    checkpoint = round_trip(tree, tmp_path)
    assert (checkpoint.architecture.name, checkpoint.num_classes) == ("wide_resnet10_1", 10)
    assert f"{prefix}sub_block1.layer.0.conv1.weight" in checkpoint.beside_note()
    for make in (lambda classes: WideResNet(10, 1, classes), with_unused_group):
        assert verify(checkpoint, tmp_path / "x.pth", torch_module=make) <= 1e-5


@pytest.mark.parametrize("heads", [False, True])
def test_auxiliary_heads_may_be_there_or_not(tmp_path, heads):
    """torchvision's GoogLeNet saves them, of training alone."""
    network = models.googlenet(num_classes=7, aux_logits=heads, init_weights=False)
    checkpoint = round_trip({"model": network.state_dict()}, tmp_path)
    assert (checkpoint.architecture.name, checkpoint.num_classes) == ("googlenet", 7)
    assert [one.name for one in checkpoint.alternatives] == ["googlenet_transform_input"]
    assert checkpoint.beside_note() is None or heads
    assert ("aux1.fc1.weight, " in (checkpoint.beside_note() or "")) == heads


def test_only_what_inference_does_not_use_is_passed_over(tmp_path):
    state = with_unused_group().state_dict()
    torch.save(
        OrderedDict((name.replace("sub_block1", "sub_block12"), one) for name, one in state.items()), tmp_path / "x.pth"
    )
    with pytest.raises(CheckpointError, match="--leave-out sub_block12"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel])
def test_a_whole_module_with_layers_that_inference_does_not_use(tmp_path, wrap):
    net = with_unused_group()
    net.fc = nn.Sequential(nn.Dropout(), net.fc)
    net.sub_block1.squash = nn.Softplus()
    torch.save(wrap(net), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert checkpoint.architecture.name == "wide_resnet10_1"
    save(checkpoint, tmp_path / "y.pth")
    before, after = (torch.load(tmp_path / file, weights_only=False).state_dict() for file in ("x.pth", "y.pth"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", ["features", "features.0", "classifier", ""])
def test_wrappers_anywhere_in_a_name(tmp_path, wrapper, place):
    def wrapped(name):
        return f"{place}.{wrapper}{name[len(place) :]}".lstrip(".") if place else f"{wrapper}.{name}"

    tree = {"net": OrderedDict((wrapped(n) if n.startswith(place) else n, v) for n, v in state().items())}
    checkpoint = round_trip(tree, tmp_path)
    assert checkpoint.architecture.name == "small_vgg"
    assert verify(checkpoint, tmp_path / "x.pth") <= 1e-5


def test_one_of_several_networks_in_a_state_dict(tmp_path):
    tree = {"state_dict": OrderedDict([*state(1, "student.").items(), *state(2, "teacher.").items()])}
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="several networks, below 'student', 'teacher'; choose one by --key"):
        load(tmp_path / "x.pth")
    for seed, name in ((1, "student"), (2, "teacher")):
        checkpoint = round_trip(tree, tmp_path, key=f"state_dict.{name}")
        np.testing.assert_array_equal(checkpoint.leaves["classifier", "bias"], state(seed)["classifier.bias"].numpy())
        assert verify(checkpoint, tmp_path / "x.pth") <= 1e-5
    tree = {"state_dict": OrderedDict([*state(1, "ema_model.").items(), *state(2, "model.").items()])}
    checkpoint = round_trip(tree, tmp_path)
    np.testing.assert_array_equal(checkpoint.leaves["classifier", "bias"], state(2)["classifier.bias"].numpy())


HEADS = {
    "deeper": lambda name: name.replace("fc.", "fc.1."),
    "of another name": lambda name: name.replace("fc.", "classifier."),
    "beside the body": lambda name: name if name.startswith("fc.") else f"backbone.{name}",
    "of another name beside the body": lambda n: n.replace("fc.", "head.") if "fc" in n else f"encoder.{n}",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_classifier_of_another_name(tmp_path, name):
    tree = OrderedDict((HEADS[name](key), value) for key, value in wide().items())
    checkpoint = round_trip(tree, tmp_path)
    assert (checkpoint.architecture.name, checkpoint.num_classes) == ("wide_resnet10_1", 10)
    make = lambda classes: WideResNet(10, 1, classes)  # noqa: E731
    assert verify(checkpoint, tmp_path / "x.pth", torch_module=make) <= 1e-5


@pytest.mark.parametrize("name", ["teacher", "ema", "net"])
def test_a_network_inside_another_is_chosen_by_the_user(tmp_path, name):
    inner = {f"{name}.{key}": value + 1 for key, value in wide().items()}
    torch.save({**wide(), **inner}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"several networks.*--key.*--leave-out {name}"):
        load(tmp_path / "x.pth")
    for options, difference in (({"key": name}, 1), ({"leave_out": (name,)}, 0)):
        bias = load(tmp_path / "x.pth", **options).leaves["fc", "bias"]
        np.testing.assert_allclose(bias, wide()["fc.bias"].numpy() + difference)


def test_a_head_of_layers_that_do_not_fit_is_named(tmp_path):
    body = {name: value for name, value in wide().items() if not name.startswith("fc.")}
    head = nn.Sequential(nn.Linear(64, 32), nn.PReLU(), nn.Linear(32, 10)).state_dict()
    torch.save({**body, **{f"fc.{name}": value for name, value in head.items()}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"Closest, as wide_resnet10_1: 2 missing: .*fc.weight"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize(("mean", "std", "network"), [
    ("0.mean", "0.std", "1."),
    ("normalize.mean", "normalize.std", "model."),
    ("normalizer.new_mean", "normalizer.new_std", "model."),
    ("mean", "std", "backbone."),
    ("pre.pixel_mean", "pre.pixel_std", "model."),
])  # fmt: skip
def test_a_normalisation_in_the_state_dict_is_the_models(tmp_path, mean, std, network, scale):
    values = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    stored = {name: scale * value.reshape(1, 3, 1, 1) for name, value in zip((mean, std), values, strict=True)}
    checkpoint = round_trip({"net": OrderedDict([*stored.items(), *state(prefix=network).items()])}, tmp_path)
    np.testing.assert_allclose(checkpoint.normalization.mean, values[0], rtol=1e-6)
    np.testing.assert_allclose(checkpoint.normalization.std, values[1], rtol=1e-6)
    np.testing.assert_allclose(inspect_file(tmp_path / "x.pth", Request()).normalization["std"], values[1], rtol=1e-6)


def test_verify_compares_with_the_users_whole_module(tmp_path):
    torch.save(nn.Sequential(Normalize(), random_vgg()).state_dict(), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    make = lambda classes: nn.Sequential(Normalize(), random_vgg(classes))  # noqa: E731
    assert verify(checkpoint, tmp_path / "x.pth", torch_module=make) <= 1e-5
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    with torch.no_grad():
        expected = make(10).eval()(as_torch(images)).numpy()
    np.testing.assert_allclose(checkpoint.model()(images), expected, atol=2e-4 * np.abs(expected).max())


def test_a_yes_or_no_model_is_refused(tmp_path):
    torch.save(random_vgg(1).state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="has one output"):
        load(tmp_path / "x.pth")


def test_numbers_called_mean_and_std_that_are_no_normalisation_are_asked_about(tmp_path):
    metric = {"score.mean": torch.zeros(3), "score.std": torch.zeros(3)}
    tree = {"net": OrderedDict([*state(prefix="model.").items(), *metric.items()])}
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="--leave-out score.mean"):
        load(tmp_path / "x.pth")
    checkpoint = round_trip(tree, tmp_path, leave_out=("score",))
    assert checkpoint.normalization is None
    assert "score.mean, score.std" in checkpoint.beside_note()


def test_a_flax_folder_keeps_what_the_file_said(tmp_path):
    """Of two networks with a normalisation each, the chosen one's; one that was left out does not come back."""
    pairs = {
        f"{who}.0.{name}": torch.full((3,), value)
        for who in ("a", "b")
        for name, value in (("mean", 0.4), ("std", 0.2))
    }
    tree = OrderedDict([*state(1, "a.1.").items(), *state(2, "b.1.").items(), *pairs.items()])
    torch.save(tree, tmp_path / "x.pth")
    for options, mean in (({"key": "a"}, 0.4), ({"key": "a", "leave_out": ("a.0",)}, None)):
        checkpoint = load(tmp_path / "x.pth", **options)
        save(checkpoint, tmp_path / "flax")
        for one in (checkpoint, load(tmp_path / "flax")):
            assert (one.normalization and round(one.normalization.mean[0], 6)) == mean
    for options in ({"key": "a"}, {"leave_out": ("a",)}, {"num_classes": 11}, {"image_size": 64}):
        with pytest.raises(CheckpointError, match="Flax folder"):
            load(tmp_path / "flax", **options)


def test_one_number_normalises_all_channels(tmp_path):
    pair = {"norm.mean": torch.tensor(0.3), "norm.std": torch.tensor([0.8])}
    checkpoint = round_trip({"net": OrderedDict([*pair.items(), *state(prefix="model.").items()])}, tmp_path)
    np.testing.assert_allclose(
        [checkpoint.normalization.mean, checkpoint.normalization.std], [[0.3] * 3, [0.8] * 3], rtol=1e-6
    )


def test_other_weights_in_the_file_are_told(tmp_path):
    """Also where they are the same dict: unlearning changes one of its names alone."""
    weights, average = random_vgg().state_dict(), random_vgg().state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save({"model": weights, "ema": average, "last": weights, "optimizer": optimizer}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").others_note().endswith(": ema, last")
    torch.save({"model": weights, "optimizer": optimizer}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").others_note() is None
