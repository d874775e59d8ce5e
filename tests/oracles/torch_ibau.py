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


def targeted_loss(model, deltas, images, targets, *, regularization=0.001):
    """Perturbations towards `targets`, each on every `len(deltas)`-th image; the published loss's counterpart."""
    total = regularization * deltas.pow(2).sum()
    for index, target in enumerate(targets):
        share = images[index :: len(deltas)]
        wanted = torch.full((len(share),), target)
        total = total + functional.cross_entropy(model((share + deltas[index]).clamp(0, 1)), wanted)
    return total


def targeted_hypergradient(
    model, deltas, images, labels, which, first, targets, *, terms, step=0.1, before=None, distillation=0.0
):
    """dL_out/dθ where image i of the outer batch gets `deltas[which[i]]`, or none where that is -1.

    The others are held to what the model `before` says, with the weight `distillation`.
    """

    def loss(deltas):
        stamped = [x if w < 0 else (x + deltas[w]).clamp(0, 1) for x, w in zip(images, which, strict=True)]
        logits = model(torch.stack(stamped))
        total = functional.cross_entropy(logits, labels)
        for index, w in enumerate(which):
            if before is not None and w < 0:
                said = before(images[index : index + 1]).log_softmax(1).detach()
                divergence = functional.kl_div(
                    logits[index : index + 1].log_softmax(1), said, log_target=True, reduction="sum"
                )
                total = total + distillation * divergence / len(which)
        return total

    return implicit(model, deltas, loss, lambda deltas: targeted_loss(model, deltas, first, targets), terms, step)[1]


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


SPACES = {"perturbation": moved_pixels, "patch": patched, "warp": warped}


def space_hypergradient(model, space, delta, target, outer, inner, *, terms, step):
    """L_out and dL_out/dθ of a perturbation of a space that leads to a class.

    L_out is the mean cross-entropy of the perturbed images of `outer`, (images, labels), to their labels; L_in that of
    the images `inner` to `target`.
    """

    def outer_of(delta):
        return functional.cross_entropy(model(SPACES[space](delta, outer[0])), outer[1])

    def inner_of(delta):
        wanted = torch.full((len(inner),), target)
        return functional.cross_entropy(model(SPACES[space](delta, inner)), wanted)

    return implicit(model, delta, outer_of, inner_of, terms, step)


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
