"""I-BAU in eager PyTorch, step for step as the published code computes it: what the benchmark compares with.

It is an implementation of its own, of the algorithm in docs/design.md, and imports nothing of ibau_jax. As in the
published code the inner maximisation calls `backward` (so that gradients of the weights are computed too), the outer
gradients by δ and by θ are two backward passes, and every term of the Neumann series is a reverse sweep over the graph
of the inner gradient, the first, of zero, included. Nothing waits and nothing is computed twice beyond that.

Images are NCHW float32 in [0, 1], on the model's device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]  # images (n, c, h, w) and labels (n,)


@dataclass(frozen=True)
class Settings:
    """The constants of the algorithm; the defaults are those of the published command line."""

    K: int = 5
    lr: float = 1e-3
    clip: bool = False
    inner_optim: Literal["sgd", "adam"] = "sgd"
    inner_lr: float = 10.0
    norm_bound: float | None = None
    fixed_point_step: float = 0.1
    regularization: float = 0.001


def rounds(
    model: nn.Module, batches: Sequence[Batch], patched: Sequence[Sequence[Tensor]], settings: Settings
) -> Iterator[Tensor]:
    """Unlearns in place, a round at a time, and yields each round's perturbation.

    Args:
        model: images to logits; put into inference mode.
        batches: the clean set.
        patched: for every round and batch the indices of the images that are perturbed in the outer step.
        settings: the constants.
    """
    model.eval()
    outer_optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    for chosen in patched:
        delta = perturbation(model, batches, settings)
        for batch, indices in zip(batches, chosen, strict=True):
            outer_optimizer.zero_grad()
            set_hypergradient(model, delta, batch, indices, batches[0], settings)
            outer_optimizer.step()
        yield delta


def perturbation(model: nn.Module, batches: Sequence[Batch], settings: Settings) -> Tensor:
    """The inner maximisation: one optimiser step a batch, then the projection."""
    delta = torch.zeros_like(batches[0][0][:1], requires_grad=True)
    make = torch.optim.SGD if settings.inner_optim == "sgd" else torch.optim.Adam
    optimizer = make([delta], lr=settings.inner_lr)
    for images, _ in batches:
        own_labels = model(images).argmax(1)
        optimizer.zero_grad()
        inner_loss(model, delta, images, own_labels, settings).backward()
        optimizer.step()
    delta = delta.detach()
    return delta if settings.norm_bound is None else delta * min(1.0, settings.norm_bound / float(delta.norm()))


def shown(images: Tensor, settings: Settings) -> Tensor:
    """What the model sees of perturbed images."""
    return images.clamp(0, 1) if settings.clip else images


def inner_loss(model: nn.Module, delta: Tensor, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """−mean CE(f(x + δ), y) + 0.001 ‖δ‖²."""
    loss = cross_entropy(model(shown(images + delta, settings)), labels)
    return -loss + settings.regularization * delta.norm() ** 2


def set_hypergradient(
    model: nn.Module, delta: Tensor, batch: Batch, indices: Tensor, first: Batch, settings: Settings
) -> None:
    """Sets every parameter's `grad` to the K-term implicit hypergradient of the outer loss on one batch."""
    params = list(model.parameters())
    delta = delta.detach().requires_grad_(True)
    images, labels = batch
    patches = torch.zeros_like(images)
    patches[indices] = delta
    outer = cross_entropy(model(shown(images + patches, settings)), labels)
    outer_delta = torch.autograd.grad(outer, delta, retain_graph=True)[0]
    outer_params = torch.autograd.grad(outer, params)

    inner = inner_loss(model, delta, *first, settings)
    mapped = delta - settings.fixed_point_step * torch.autograd.grad(inner, delta, create_graph=True)[0]
    v = torch.zeros_like(delta)
    for _ in range(settings.K):
        v = torch.autograd.grad(mapped, delta, grad_outputs=v, retain_graph=True)[0] + outer_delta
    implicit = torch.autograd.grad(mapped, params, grad_outputs=v, allow_unused=True)
    for param, direct, through in zip(params, outer_params, implicit, strict=True):
        param.grad = direct if through is None else direct + through


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, stamp: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The class of every image, (n,)."""
    parts = (part if stamp is None else stamp(part) for part in images.split(500))
    return torch.cat([model(part).argmax(1) for part in parts])
