"""I-BAU in PyTorch autograd, written from the algorithm's description: the independent oracle of the JAX code.

Nothing here imports ibau_jax. Images are NCHW float tensors in [0, 1].
"""

import torch
from torch.nn import functional


def inner_loss(model, delta, images, labels, *, clip=False, regularization=0.001):
    perturbed = images + delta
    if clip:
        perturbed = perturbed.clamp(0, 1)
    return -functional.cross_entropy(model(perturbed), labels) + regularization * delta.pow(2).sum()


def outer_loss(model, delta, images, labels, mask, *, clip=False):
    perturbed = images + mask[:, None, None, None] * delta
    if clip:
        perturbed = perturbed.clamp(0, 1)
    return functional.cross_entropy(model(perturbed), labels)


def hypergradient(model, delta, outer, first, *, terms, step=0.1, clip=False):
    """dL_out/dθ of the published losses: a list like `model.parameters()`."""

    def loss(delta):
        return outer_loss(model, delta, *outer, clip=clip)

    return implicit(model, delta, loss, lambda delta: inner_loss(model, delta, *first, clip=clip), terms, step)


def implicit(model, delta, outer, inner, terms, step):
    """L_out and dL_out/dθ with the Neumann series of `terms` terms, for losses that are functions of δ.

    Reverse mode over reverse mode throughout: v <- v ∂Φ/∂δ + ∂L_out/∂δ, then v ∂Φ/∂θ + ∂L_out/∂θ.
    """
    params = list(model.parameters())
    delta = delta.detach().requires_grad_(True)
    loss = outer(delta)
    direct = torch.autograd.grad(loss, [delta, *params], allow_unused=True)
    outer_delta, outer_params = direct[0], direct[1:]
    gradient = torch.autograd.grad(inner(delta), delta, create_graph=True)[0]
    mapped = delta - step * gradient
    v = torch.zeros_like(delta)
    for _ in range(terms):
        v = torch.autograd.grad(mapped, delta, grad_outputs=v, retain_graph=True)[0] + outer_delta
    through = torch.autograd.grad(mapped, params, grad_outputs=v, allow_unused=True)
    zeros = [torch.zeros_like(p) for p in params]
    total = [
        (i if i is not None else z) + (o if o is not None else z)
        for i, o, z in zip(through, outer_params, zeros, strict=True)
    ]
    return loss.detach(), total


def moved_pixels(delta, images):
    return (images + delta).clamp(0, 1)


def patched(delta, images):
    """The mask is the first channel of δ, the pattern the others."""
    return images * (1 - delta[:1]) + delta[:1] * delta[1:]


def warped(flow, images):
    """WaNet's warp: a flow (2, k, k) in pixels, rows first; `grid_sample` has no second derivative, so by hand."""
    height, width = images.shape[-2:]
    enlarged = functional.interpolate(flow[None], (height, width), mode="bicubic", align_corners=True)[0]
    rows = (torch.arange(height)[:, None] + enlarged[0]).clamp(0, height - 1)
    columns = (torch.arange(width)[None] + enlarged[1]).clamp(0, width - 1)
    top, left = rows.detach().floor().clamp(max=height - 2).long(), columns.detach().floor().clamp(max=width - 2).long()
    down, right = rows - top, columns - left
    upper = images[..., top, left] * (1 - right) + images[..., top, left + 1] * right
    lower = images[..., top + 1, left] * (1 - right) + images[..., top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


SPACES = {"perturbation": moved_pixels, "patch": patched, "warp": warped, "wave": moved_pixels}


def players_hypergradient(
    model, space, deltas, targets, enlarge, untargeted, outer, seen, *, terms, step, teacher, distillation, consistency
):
    """L_out and dL_out/dθ where image i gets player `which[i]`, made `factor[i]` times as large; none where -1.

    Where it is -2 the image gets `untargeted`, made larger in the same way, and clipped to [0, 1] by nobody.

    `outer` is (images, labels, which, factor, weight) and `seen` (images, labels): the first player's own loss is the
    mean cross-entropy to its target over the images of other classes. All images are held to what `teacher` says of them as
    they were, those that get something by `consistency`.
    """
    images, labels, which, factors, weights = outer

    def stamped(deltas, x, w, factor):
        if w < 0:
            return x if w == -1 else x + factor * untargeted
        return SPACES[space](enlarge(deltas[w], factor), x[None])[0]

    def outer_of(deltas):
        logits = model(torch.stack([stamped(deltas, *image) for image in zip(images, which, factors, strict=True)]))
        held = torch.tensor([distillation if w == -1 else consistency for w in which])
        said = teacher(images).log_softmax(1).detach()
        apart = functional.kl_div(logits.log_softmax(1), said, log_target=True, reduction="none").sum(1)
        return ((functional.cross_entropy(logits, labels, reduction="none") + held * apart) * weights).mean()

    def inner_of(deltas):
        others = seen[0][seen[1] != targets[0]]
        wanted = torch.full((len(others),), targets[0])
        return functional.cross_entropy(model(SPACES[space](deltas[0], others)), wanted)

    return implicit(model, deltas, outer_of, inner_of, terms, step)


def perturbation(model, batches, *, clip, optimizer, learning_rate, bound, regularization=0.001):
    """The inner maximisation over (images, labels) batches, and the projection."""
    delta = torch.zeros_like(batches[0][0][:1]).requires_grad_(True)
    inner = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]([delta], lr=learning_rate)
    for images, _ in batches:
        own_labels = model(images).argmax(1).detach()
        loss = inner_loss(model, delta, images, own_labels, clip=clip, regularization=regularization)
        delta.grad = torch.autograd.grad(loss, delta)[0]
        inner.step()
    delta = delta.detach()
    return delta if bound is None else delta * min(1.0, bound / float(delta.norm()))


def outer_round(model, delta, batches, masks, *, optimizer, terms, clip):
    """The outer minimisation over the batches, with given patched images; changes the model. Returns the losses."""
    losses = []
    for (images, labels), mask in zip(batches, masks, strict=True):
        loss, gradients = hypergradient(model, delta, (images, labels, mask), batches[0], terms=terms, clip=clip)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(float(loss))
    return losses
