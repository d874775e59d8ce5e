"""Known networks as people wrap them, in PyTorch: behind a normalisation, beside other modules, with masked neurons."""

import torch
from torch import nn


class Normalize(nn.Module):
    """The statistics that images are normalised with, as buffers with these names and of this shape."""

    def __init__(self, mean="mean", std="std", shape=(1, 3, 1, 1)):
        super().__init__()
        self.names = mean, std
        self.register_buffer(mean, torch.tensor([0.4, 0.5, 0.6]).reshape(shape))
        self.register_buffer(std, torch.tensor([0.2, 0.3, 0.4]).reshape(shape))

    def forward(self, x):
        mean, std = (getattr(self, name) for name in self.names)
        return (x - mean) / std


class Attacker(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.normalize, self.model = Normalize("new_mean", "new_std", (3, 1, 1)), model


class AttackerModel(nn.Module):
    """MadryLab/robustness has each network in two places, and its normalisation twice; images are clipped first."""

    def __init__(self, model):
        super().__init__()
        self.normalizer, self.model = Normalize("new_mean", "new_std", (3, 1, 1)), model
        self.attacker = Attacker(model)

    def forward(self, x):
        return self.model(self.normalizer(x.clamp(0, 1)))


class Lightning(nn.Module):
    """A network beside a loss that weighs classes."""

    def __init__(self, model, classes):
        super().__init__()
        self.model, self.criterion = model, nn.CrossEntropyLoss(weight=torch.ones(classes))

    def forward(self, x):
        return self.model(x)


class EncoderAndLast(nn.Module):
    """A network whose last layer stands beside the others, as contrastive training has it."""

    def __init__(self, model, classes):
        super().__init__()
        self.fc, self.encoder = nn.Linear(model.fc.in_features, classes), model
        model.fc = nn.Identity()

    def forward(self, x):
        return self.fc(self.encoder(x))


class MaskedBatchNorm(nn.BatchNorm2d):
    """ANP's and RNP's: in inference a mask scales the weight."""

    def __init__(self, features, noise):
        super().__init__(features)
        self.neuron_mask = nn.Parameter(torch.rand(features).round())
        if noise:
            self.neuron_noise = nn.Parameter(torch.rand(features))
            self.neuron_noise_bias = nn.Parameter(torch.rand(features))

    def forward(self, x):
        weight = self.weight * self.neuron_mask
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, False, 0.1, self.eps)


def with_masked_neurons(module, noise=True):
    """The module with all its BatchNorms masked."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                masked = MaskedBatchNorm(child.num_features, noise)
                masked.load_state_dict(child.state_dict(), strict=False)
                setattr(parent, name, masked)
    return module
