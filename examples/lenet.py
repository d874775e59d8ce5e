"""LeNet-5 as PyTorch's CIFAR-10 tutorial writes it: an example of `--model FILE.py:CLASS` (docs/custom_model.md)."""

import jax
from flax import nnx

from ibau_jax.models.layers import Flatten, MaxPool


class LeNet(nnx.Module):
    """Logits of 32x32 RGB images in [0, 1]."""

    image_size = 32  # of an image, or (height, width); --image-size overrules it
    channels = 3
    classifier_name = "fc3.weight"  # whose first dimension is the number of classes

    def __init__(self, num_classes: int, image_size: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 6, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.pool = MaxPool(2)
        self.flatten = Flatten()  # in PyTorch's order, channels first
        self.fc1 = nnx.Linear(16 * 5 * 5, 120, rngs=rngs)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs)
        self.fc3 = nnx.Linear(84, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.pool(jax.nn.relu(self.conv1(x)))
        x = self.flatten(self.pool(jax.nn.relu(self.conv2(x))))
        x = jax.nn.relu(self.fc2(jax.nn.relu(self.fc1(x))))
        return self.fc3(x)
