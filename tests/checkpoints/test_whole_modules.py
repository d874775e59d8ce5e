"""`torch.save(model)`: read as data, and written back so that the file loads in the code that it came from."""

import collections
import functools
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ibau_jax import load, save
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import CheckpointError
from tests.checkpoints.test_conversion import random_vgg
from tests.checkpoints.test_inspection import looked_at
from tests.conftest import ROOT
from tests.oracles.cifar_models import torch_oracle
from tests.oracles.look_alikes import resnet
from tests.oracles.timm_models import TIMM, made
from tests.oracles.torchvision_models import models
from tests.oracles.torchvision_sizes import torchvision_of_size

FORMS = {
    "zip": lambda tree, file: torch.save(tree, file),
    "zip, protocol 4": lambda tree, file: torch.save(tree, file, pickle_protocol=4),
    "legacy": lambda tree, file: torch.save(tree, file, _use_new_zipfile_serialization=False),
}


HERE = {**os.environ, "PYTHONPATH": str(ROOT)}


class Network(nn.Module):
    """Somebody's own class around a network."""

    def __init__(self):
        super().__init__()
        self.body = torch_oracle("wide_resnet10_1", 10, 32)
        self.mean = torch.tensor([0.5, 0.4, 0.3])
        self.register_buffer("cache", torch.ones(7), persistent=False)

    def forward(self, x):
        return self.body(x)


class Settings(dict):
    """A configuration as people write it."""


def logits(module):
    with torch.no_grad():
        return module.eval()(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [Network, lambda: nn.DataParallel(Network()), lambda: random_vgg(seed=3)])
def test_a_whole_module_comes_back_with_other_weights(tmp_path, form, make):
    module = make()
    FORMS[form](module, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    save(checkpoint, tmp_path / "same.pth")
    same = torch.load(tmp_path / "same.pth", weights_only=False)
    assert type(same) is type(module)
    assert list(same.state_dict()) == list(module.state_dict())
    assert all(
        torch.equal(one, other)
        for one, other in zip(*(one.state_dict().values() for one in (same, module)), strict=True)
    )
    torch.testing.assert_close(logits(same), logits(module), rtol=0, atol=0)
    assert verify(checkpoint, tmp_path / "x.pth", torch_module=lambda classes: make()) <= 1e-5
    changed = {path: leaf + np.float32(1) for path, leaf in checkpoint.leaves.items()}
    save(replace(checkpoint, leaves=changed), tmp_path / "other.pth")
    other = torch.load(tmp_path / "other.pth", weights_only=False)
    for (name, one), before in zip(other.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one, before + 1, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_beside_it_is_kept_and_shares_its_tensors(tmp_path, form):
    model = random_vgg()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    logits(model).sum()
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    tree = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        "criterion": nn.CrossEntropyLoss(label_smoothing=0.1),
        "config": Settings(lr=0.1),
        "epoch": 3,
    }
    FORMS[form](tree, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert set(checkpoint.metadata()) == set(tree) - {"model"}
    changed = {path: leaf + np.float32(1) for path, leaf in checkpoint.leaves.items()}
    save(replace(checkpoint, leaves=changed), tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth", weights_only=False)
    own = back["optimizer"].param_groups[0]["params"]
    assert [id(one) for one in own] == [id(one) for one in back["model"].parameters()]
    assert back["scheduler"].optimizer is back["optimizer"]
    buffers = back["optimizer"].state[own[0]]["momentum_buffer"]
    torch.testing.assert_close(buffers, optimizer.state[next(model.parameters())]["momentum_buffer"], rtol=0, atol=0)
    assert (back["config"], type(back["config"]), back["criterion"].label_smoothing) == (
        Settings(lr=0.1),
        Settings,
        0.1,
    )


def test_transforms_and_functions_beside_it_are_kept(tmp_path):
    from torchvision import transforms

    steps = transforms.Compose([transforms.Resize(32), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    make = functools.partial(nn.LayerNorm, eps=1e-6)
    tree = {"net": random_vgg().state_dict(), "transform": steps, "loss": nn.functional.cross_entropy, "make": make}
    torch.save(tree, tmp_path / "x")
    save(load(tmp_path / "x"), tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth", weights_only=False)
    assert repr(back["transform"]) == repr(steps)
    assert back["loss"] is nn.functional.cross_entropy
    assert (back["make"].func, back["make"].keywords) == (nn.LayerNorm, {"eps": 1e-6})


def test_no_module_that_a_file_names_is_imported(tmp_path):
    (tmp_path / "theirs.py").write_text("import torch\nprint('imported')\nclass Net(torch.nn.Sequential):\n    pass\n")
    made = "import theirs, torch; torch.save(theirs.Net(torch.nn.Linear(2, 2)), 'x.pth')"
    subprocess.run([sys.executable, "-c", made], cwd=tmp_path, check=True, capture_output=True)
    reading = (
        "import sys\nfrom pathlib import Path\nfrom ibau_jax.checkpoints.reader import read_torch_file\n"
        "tree = read_torch_file(Path('x.pth')).tree\nassert str(tree.kind) == 'theirs.Net', tree\n"
        "assert 'theirs' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", reading], cwd=tmp_path, env=HERE, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


class Calls:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, torch.hub.load, subprocess.Popen, nn.Linear])
def test_what_a_module_has_called_is_refused(tmp_path, function):
    model = random_vgg()
    model.hook = Calls(function, "1")
    torch.save(model, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=function.__name__):
        load(tmp_path / "x.pth")


def test_the_look_says_whose_objects_there_are(tmp_path):
    torch.save({"net": Network(), "evil": Calls(eval, "1")}, tmp_path / "x.pth")
    report = looked_at(tmp_path / "x.pth")
    assert "tests.checkpoints.test_whole_modules.Network" in report.unknown_classes
    assert report.refused_globals == ("__builtin__.eval",)
    assert report.model == "wide_resnet10_1"
    assert report.entries["evil"] == "__builtin__.eval object"


VARIANTS = {
    "resnet18": {},
    "resnet18_no_pool": {"pool": False},
    "resnet18_stride1": {"stride": 1},
    "resnet18_small_stem": {"kernel": 3, "stride": 1, "pool": False},
    "resnet18_small_stem_stride2_max_pool": {"kernel": 3, "stride": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_settle_which_network_it_is(tmp_path, name):
    """Of these networks the names and shapes of all tensors are the same, or those of two of them."""
    torch.save(resnet(18, 10, **VARIANTS[name]), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth", num_classes=10)
    assert (checkpoint.architecture.name, checkpoint.alternatives) == (name, ())


def changed_layers(model, kind, change):
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, kind):
                setattr(module, name, change(child))
    return model


ALTERED = {
    "resnet18_small_stem+leaky_relu": (nn.ReLU, lambda _: nn.LeakyReLU(0.01)),
    "resnet18_small_stem+silu": (nn.ReLU, lambda _: nn.SiLU()),
    "resnet18_small_stem+eps1e-3": (nn.BatchNorm2d, lambda norm: with_(norm, eps=1e-3)),
}


def with_(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("name", ALTERED)
def test_layers_settle_what_is_altered(tmp_path, name):
    """Two of these move the statistics too little for clean images to tell."""
    model = changed_layers(resnet(18, 10, **VARIANTS["resnet18_small_stem"]), *ALTERED[name])
    torch.save(model, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: with_(model.layer3[0].conv1, stride=(3, 3)), r"layer3\.0\.conv1: stride"),
        (lambda model: with_(model.layer2[0].conv2, dilation=(2, 2), padding=(2, 2)), "dilation"),
        (lambda model: with_(model.conv1, padding_mode="reflect"), "padding_mode"),
        (lambda model: with_(model.bn1, eps=0.1), r"bn1: eps 0\.1"),
        (lambda model: changed_layers(model, nn.ReLU, lambda _: nn.LeakyReLU(0.3)), r"leaky_relu0\.3"),
        (lambda model: setattr(model.layer1[0], "conv2", nn.ConvTranspose2d(64, 64, 3, 1, 1, bias=False)), "Transpose"),
        (lambda model: setattr(model, "maxpool", nn.Tanh()), "maxpool: .*Tanh"),
        (lambda model: setattr(model, "avgpool", nn.AdaptiveMaxPool2d(1)), "AdaptiveMaxPool2d"),
    ],
)
def test_layers_that_no_network_here_has_are_refused(tmp_path, change, said):
    model = resnet(18, 10, **VARIANTS["resnet18_small_stem"])
    change(model)
    torch.save(model, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        "mobilenet_v3_large",
        "densenet121",
        "shufflenet_v2_x0_5",
        "mnasnet0_5",
        "regnet_y_400mf",
        pytest.param("efficientnet_v2_s", marks=pytest.mark.slow),
        "convnext_tiny",
        "seresnet18",
        "resnet18d",
        pytest.param("vit_b_16", marks=pytest.mark.slow),
    ],
)
def test_torchvisions_and_timms_own(tmp_path, name):
    torch.manual_seed(0)
    module = TIMM[name](5) if name in TIMM else getattr(models, name)(num_classes=5)
    torch.save(module, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert (checkpoint.architecture.name, checkpoint.num_classes) == (name, 5)
    assert checkpoint.alternatives == ()
    save(checkpoint, tmp_path / "y.pth")
    before, after = (torch.load(tmp_path / file, weights_only=False).state_dict() for file in ("x.pth", "y.pth"))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        ("resnetblur18", "resnet18_blur"),
        pytest.param("resnetaa50", "resnet50_aa", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", "efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("tf_efficientnet_b0", "tf_efficientnet_b0", marks=pytest.mark.slow),
    ],
)
def test_timms_layers_tell_look_alikes(tmp_path, theirs, name):
    torch.save(made(theirs, 5), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert (checkpoint.architecture.name, checkpoint.alternatives) == (name, ())


def test_axes_in_another_order_are_refused(tmp_path):
    model = torchvision_of_size("convnext_w16_32_d1_2", 5)
    torch.save(model, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == "convnext_w16_32_d1_2"
    model.features[1][0].block[6].dims = [0, 3, 2, 1]
    torch.save(model, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"features\.1\.0\.block\.6: dims"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("googlenet", {}),
        ("googlenet", {"transform_input": True}),
        pytest.param("inception_v3", {"transform_input": True}, marks=pytest.mark.slow),
    ],
)
def test_auxiliary_heads_and_transformed_images_of_torchvisions_own(tmp_path, name, options):
    network = getattr(models, name)(num_classes=5, init_weights=False, **options)
    torch.save(nn.DataParallel(network), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert checkpoint.architecture.name == f"{name}_transform_input" if options else name
    assert checkpoint.alternatives == ()
    save(checkpoint, tmp_path / "y.pth")
    before, after = (torch.load(tmp_path / file, weights_only=False).state_dict() for file in ("x.pth", "y.pth"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def module(**children):
    parts = {"_parameters": {}, "_buffers": {}, "_modules": dict(children)}
    made = nn.Module.__new__(nn.Module)
    made.__dict__.update(parts)
    return made


def test_a_module_in_two_places_of_each_of_many_is_refused(tmp_path):
    """2 ** 30 names in a few kilobytes."""
    inner = nn.Linear(2, 2)
    for _ in range(30):
        inner = module(a=inner, b=inner)
    torch.save(inner, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="modules: refused"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["a" * 500, "dict"])
def test_long_names_and_states_twice_are_refused(tmp_path, name):
    if name == "dict":
        content = b"\x80\x02cx\nY\n)\x81}b}b."
        (tmp_path / "x.pkl").write_bytes(content)
    else:
        torch.save(module(**{name: nn.Linear(2, 2)}), tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match="refused"):
        load(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_dumped(tmp_path, protocol):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(collections.OrderedDict(model=random_vgg()), protocol=protocol))
    save(load(tmp_path / "x.pkl"), tmp_path / "y.pkl")
    back = pickle.loads((tmp_path / "y.pkl").read_bytes())["model"]
    torch.testing.assert_close(logits(back), logits(random_vgg()))


def test_the_tree_holds_no_object_of_the_files_classes(tmp_path):
    torch.save(Network(), tmp_path / "x.pth")
    kinds, waiting = set(), [read_torch_file(tmp_path / "x.pth").tree]
    while waiting:
        value = waiting.pop()
        kinds.add(type(value).__module__.partition(".")[0])
        waiting += value.values() if isinstance(value, dict) else [value.state] if hasattr(value, "state") else []
    assert kinds <= {"builtins", "collections", "ibau_jax"}


class Shared(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.net = random_vgg(seed=2)
        self.act = nn.Dropout()
        self.again = self.act

    def forward(self, x):
        return self.again(self.act(self.net(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, for TorchScript as such
@pytest.mark.parametrize("script", [torch.jit.script, lambda net: torch.jit.trace(net, torch.rand(1, 3, 32, 32))])
@pytest.mark.parametrize("make", [lambda: random_vgg(seed=2), Shared])
def test_torchscript_comes_back_with_other_weights(tmp_path, script, make):
    net = make().eval()
    torch.jit.save(script(net), tmp_path / "x.pt")
    checkpoint = load(tmp_path / "x.pt")
    assert looked_at(tmp_path / "x.pt").format == "torchscript"
    changed = {path: leaf * np.float32(1.25) for path, leaf in checkpoint.leaves.items()}
    save(replace(checkpoint, leaves=changed), tmp_path / "flax")
    save(load(tmp_path / "flax"), tmp_path / "y.pt")
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                tensor *= 1.25
    torch.testing.assert_close(logits(torch.jit.load(tmp_path / "y.pt")), logits(net), rtol=1e-5, atol=1e-5)
    before, after = (zipfile.ZipFile(tmp_path / name) for name in ("x.pt", "y.pt"))
    for name in before.namelist():
        own = name.partition("/")[2]
        if not own.startswith("data"):
            assert after.read(f"archive/{own}") == before.read(name), own


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_torchscript_says_that_it_has_no_weights(tmp_path):
    torch.jit.save(torch.jit.freeze(torch.jit.script(random_vgg().eval())), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        load(tmp_path / "x.pt")


def hook(module, inputs, output):
    return -output


class Standardised(nn.Conv2d):
    """Somebody's own convolution."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


def own_convolution(old):
    new = Standardised(old.in_channels, old.out_channels, old.kernel_size, padding=old.padding)
    return with_(new, weight=old.weight, bias=old.bias)


OTHERWISE = {
    "sigmoid": lambda net: changed_layers(net, nn.ELU, lambda _: nn.Sigmoid()),
    "Softplus": lambda net: changed_layers(net, nn.ELU, lambda _: nn.Softplus()),
    "elu0.3": lambda net: changed_layers(net, nn.ELU, lambda _: nn.ELU(alpha=0.3)),
    "leaky_relu1": lambda net: changed_layers(net, nn.ELU, lambda _: nn.LeakyReLU(1)),
    "tanh": lambda net: with_(net, features=nn.Sequential(*net.features[:2], nn.Tanh(), *net.features[3:])),
    "Upsample": lambda net: nn.Sequential(nn.Upsample(size=(32, 32)), net),
    "AvgPool2d": lambda net: nn.Sequential(nn.AvgPool2d(1), net),
    "InstanceNorm2d": lambda net: nn.Sequential(nn.InstanceNorm2d(3), net),
    "Softmin": lambda net: nn.Sequential(net, nn.Softmin(dim=1)),
    "Standardised": lambda net: changed_layers(net, nn.Conv2d, own_convolution),
    "_forward_hooks": lambda net: (net.features[0].register_forward_hook(hook), net)[1],
    "forward": lambda net: with_(net, forward=hook),
    "pooling.AvgPool2d": lambda net: changed_layers(net, nn.MaxPool2d, lambda _: nn.AvgPool2d(2, divisor_override=3)),
}


@pytest.mark.parametrize("said", OTHERWISE)
def test_what_a_module_computes_otherwise_is_refused(tmp_path, said):
    torch.save(OTHERWISE[said](random_vgg()), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"other layers: .*{said}"):
        load(tmp_path / "x.pth")


def test_a_layer_that_takes_no_part_can_be_left_out(tmp_path):
    net = random_vgg()
    net.preview = nn.Upsample(scale_factor=2)
    torch.save(net, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"preview: torch.nn.modules.upsampling.Upsample. .*--leave-out"):
        load(tmp_path / "x.pth")
    assert load(tmp_path / "x.pth", leave_out=("preview",)).architecture.name == "small_vgg"


def test_a_normalisation_before_the_network_is_the_models(tmp_path):
    from torchvision import transforms

    net = nn.Sequential(transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), random_vgg()).eval()
    torch.save(net, tmp_path / "x.pth")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images).numpy()
    found = load(tmp_path / "x.pth").model()(images.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert looked_at(tmp_path / "x.pth").normalization == {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def test_a_layer_in_two_places_is_refused(tmp_path):
    net = resnet(18, 10, **VARIANTS["resnet18_small_stem"])
    net.layer1[1] = net.layer1[0]
    torch.save(net, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="are one tensor in the file"):
        load(tmp_path / "x.pth")
    assert "are one tensor in the file" in looked_at(tmp_path / "x.pth").problem


def test_a_vision_transformer_with_other_heads_is_refused(tmp_path):
    net = models.VisionTransformer(32, 8, 2, 4, 256, 1024, num_classes=5)
    torch.save(net, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").architecture.name == "vit_w256_d2_p8"
    torch.save(models.VisionTransformer(32, 8, 2, 8, 256, 1024, num_classes=5), tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="num_heads 8"):
        load(tmp_path / "y.pth")


def test_a_name_that_is_more_than_a_name_is_refused(tmp_path):
    """Written as a line, it would be opcodes."""
    name = "Size\ncposix\nsystem\n(S'id'\ntR0ctorch\nSize"
    text = [b"\x8c" + bytes([len(one)]) + one.encode() for one in ("torch", name)]
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + b"".join(text) + b"\x93.")
    for look in (load, looked_at):
        with pytest.raises(CheckpointError, match="no name"):
            look(tmp_path / "x.pkl")


def test_one_module_under_a_thousand_names_is_refused(tmp_path):
    inner = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(1000)])
    torch.save(module(**{f"m{number}": inner for number in range(1000)}), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="tensors: refused"):
        load(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_storages_of_another_case_are_no_members_of_a_script(tmp_path):
    torch.jit.save(torch.jit.script(random_vgg().eval()), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as one, zipfile.ZipFile(tmp_path / "y.pt", "w") as other:
        for name in one.namelist():
            other.writestr(name.replace("/data/", "/Data/"), one.read(name))
    save(load(tmp_path / "y.pt"), tmp_path / "z.pt")
    assert not any("Data/" in name for name in zipfile.ZipFile(tmp_path / "z.pt").namelist())


def test_a_layer_of_the_network_itself_can_not_be_left_out(tmp_path):
    torch.save(OTHERWISE["Softplus"](random_vgg()), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"features.2: Softplus; .* and \d+ more"):
        load(tmp_path / "x.pth", leave_out=("features.2", "features.5"))


class Skipping(nn.Sequential):
    """Layers of a chain, in code of its own: one of them is added to what it is given."""

    def forward(self, x):
        x = nn.functional.relu(self[0](x))
        x = x + nn.functional.relu(self[1](x))
        return self[2](x.mean((2, 3)))


@pytest.mark.parametrize(("made_of", "is_assumed"), [(nn.Sequential, False), (Skipping, True)])
def test_a_chains_order_is_assumed_where_code_says_it(tmp_path, made_of, is_assumed):
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)]
    if not is_assumed:
        layers = [layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers[2]]
    torch.save(made_of(*layers), tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert checkpoint.architecture.name.startswith("chain3x")
    assert bool(checkpoint.assumption_note()) is is_assumed
    save(checkpoint, tmp_path / "flax")
    assert load(tmp_path / "flax").assumption_note() == checkpoint.assumption_note()
    assert looked_at(tmp_path / "x.pth").assumed is is_assumed
    assert load(tmp_path / "x.pth", model=checkpoint.architecture.name).assumption_note() is None
