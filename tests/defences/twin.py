"""A small net with two convolutions in Flax and in PyTorch, with the same weights, and images for it."""

import numpy as np
import torch
from flax import nnx

from ibau_jax.checkpoints.conversion import to_torch, torch_name
from ibau_jax.data import Dataset
from ibau_jax.models.layers import Activation, Flatten, MaxPool, Sequential, batch_norm, conv, linear, relu
from tests.oracles.twins import randomised

CLASSES, SIZE = 4, 8


class Small(nnx.Module):
    def __init__(self, rngs):
        self.features = Sequential(
            [
                *(conv(3, 5, 3, rngs, bias=True), batch_norm(5, rngs), Activation(relu), MaxPool(2)),
                *(conv(5, 6, 3, rngs, bias=True), batch_norm(6, rngs), Activation(relu)),
            ]
        )
        self.flatten = Flatten()
        self.classifier = linear(6 * 16, CLASSES, rngs)

    def __call__(self, x):
        return self.classifier(self.flatten(self.features(x)))


def torch_small():
    module = torch.nn.Sequential()
    layers = [torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.BatchNorm2d(5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    layers += [torch.nn.Conv2d(5, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU()]
    module.add_module("features", torch.nn.Sequential(*layers))
    module.add_module("flatten", torch.nn.Flatten())
    module.add_module("classifier", torch.nn.Linear(6 * 16, CLASSES))
    return module


def twins(seed):
    """The two nets, in inference mode."""
    model, module = randomised(Small(nnx.Rngs(seed)), np.random.default_rng(seed)), torch_small()
    module.load_state_dict(as_state_dict(nnx.state(model)), strict=False)
    return model, module.eval()


def as_state_dict(state):
    return {torch_name(path): torch.tensor(to_torch(path, np.array(leaf[...])).copy()) for path, leaf in flat(state)}


def flat(state):
    return nnx.to_flat_state(state)


def blobs(count, seed=0):
    """Classes that a small net learns: a bright quarter of a noisy image."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    images = rng.uniform(0, 0.4, (count, SIZE, SIZE, 3)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.4
    return Dataset(images, labels, "blobs")
