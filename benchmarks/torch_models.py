"""The benchmarked architectures and their images in PyTorch, without JAX in the process."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tests.oracles.cifar_models import torch_oracle


def torch_model(name: str, classes: int, image_size: int) -> nn.Module:
    """A module by its registered name."""
    if name == "small_vgg":
        return SmallVGG(classes)
    if name in ("resnet50", "vit_b_16"):
        from tests.oracles.torchvision_models import models

        module: nn.Module = getattr(models, name)(num_classes=classes)
        return module
    return torch_oracle(name, classes, image_size)


def loaded(file: Path, name: str, image_size: int) -> nn.Module:
    """A checkpoint's model, by the registered name of its architecture."""
    state_dict = torch.load(file, map_location="cpu", weights_only=True)["net"]
    model = torch_model(name, state_dict[list(state_dict)[-1]].shape[0], image_size)
    model.load_state_dict(state_dict)
    return model


def in_torch(images: np.ndarray) -> Tensor:
    """Images (n, h, w, c), uint8 or float32 in [0, 1], as NCHW in [0, 1]."""
    unit = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
    return torch.as_tensor(np.ascontiguousarray(unit.transpose(0, 3, 1, 2)))


class SmallVGG(nn.Module):
    """The network of the checkpoints published with the I-BAU paper."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
                before = width
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(before * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of NCHW images."""
        logits: Tensor = self.classifier(self.flatten(self.features(x)))
        return logits
