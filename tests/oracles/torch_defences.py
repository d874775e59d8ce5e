"""Gradients of other defences in PyTorch autograd, written from the papers: the independent oracle of the JAX code.

Nothing here imports ibau_jax. Images are NCHW float tensors in [0, 1].
"""

import copy

import torch
from torch.nn import functional


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def smoothed(logits, labels, smoothing):
    """Label smoothing where the other classes share `smoothing` evenly."""
    target = torch.full_like(logits, smoothing / (logits.shape[1] - 1))
    target[torch.arange(len(labels)), labels] = 1 - smoothing
    return -(target * logits.log_softmax(1)).sum(1).mean()


def sam(module, images, labels, rho, smoothing):
    """The gradient at the worst place of the ball that the weights' magnitudes scale; BatchNorm in training mode."""
    first = gradients(module, smoothed(module(images), labels, smoothing))
    norm = torch.stack([(first[name] * p.abs()).norm() for name, p in module.named_parameters()]).norm()
    moved = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter += rho * parameter.abs() ** 2 * first[name] / norm
    return gradients(moved, smoothed(moved(images), labels, smoothing))


def shared_examples(module, before, images, labels, bound, steps, adversarial, shared):
    """Projected gradient descent on each image, from the corner of the ball, for examples that fool both alike."""
    delta = torch.full_like(images, bound)
    own, own_before = module(images).argmax(1), before(images).argmax(1)
    for _ in range(steps):
        delta.requires_grad_(True)
        logits, others = module(images + delta), before(images + delta)
        fooled, fooled_before = logits.argmax(1) != own, others.argmax(1) != own_before
        alike = fooled & fooled_before & (logits.argmax(1) == others.argmax(1))
        right = functional.cross_entropy(logits, labels, reduction="none")[~fooled].sum()
        right = right + functional.cross_entropy(others, labels, reduction="none")[~fooled_before].sum()
        p, q = logits.softmax(1), others.softmax(1)
        middle = (p + q) / 2
        apart = 0.5 * (p * (p / middle).log()).sum(1) + 0.5 * (q * (q / middle).log()).sum(1)
        loss = (shared * apart[~alike].sum() - adversarial * right / 2) / len(images)
        slope = torch.autograd.grad(loss, delta)[0]
        delta = (delta.detach() - bound * slope.sign()).clamp(-bound, bound)
    return images + delta


def sau(module, before, images, labels, **search):
    examples = shared_examples(module, before, images, labels, **search)
    others = before(examples).argmax(1)
    poisoned = (others != labels) & (others != before(images).argmax(1))
    p = module(examples).softmax(1)[torch.arange(len(labels)), others][poisoned]
    risk = -(torch.log(1e-6 + (1 - p).clamp(max=0.999)) + torch.log(1 + 1e-6 - p.clamp(min=0.001))).sum()
    loss = functional.cross_entropy(module(images), labels) + risk / 2 / len(labels)
    return gradients(module, loss), int(poisoned.sum())


def attention_distance(module, teacher, images, labels, layers, betas):
    """Cross-entropy and the distances of attention maps at `layers`, indices into `module.features`."""

    def looked(net):
        seen, x = [], images
        for index, layer in enumerate(net.features):
            x = layer(x)
            if index in layers:
                energy = (x**2).sum(1).flatten(1)
                seen.append(functional.normalize(energy, dim=1))
        return seen, net.classifier(net.flatten(x))

    maps, logits = looked(module)
    wanted, _ = looked(teacher)
    apart = sum(beta * functional.mse_loss(a, b.detach()) for beta, a, b in zip(betas, maps, wanted, strict=True))
    return gradients(module, functional.cross_entropy(logits, labels) + apart)


def noisy(module, masks, scales, shifts):
    """The net with every BatchNorm's weight times mask + scale, and bias times 1 + shift."""
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for name, layer in changed.named_modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight *= masks[name] + scales[name]
                layer.bias *= 1 + shifts[name]
    return changed
