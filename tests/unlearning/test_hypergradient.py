"""The hypergradient against a closed form, finite differences in float64, and PyTorch autograd."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.batches import Batches
from ibau_jax.checkpoints.conversion import to_torch, torch_name
from ibau_jax.config import UnlearnConfig
from ibau_jax.image_size import ImageSize
from ibau_jax.models.small_vgg import SmallVGG
from ibau_jax.perturbations import Patch, Pixel, Warp, Wave
from ibau_jax.unlearning.hypergradient import SOLVERS, gradient_step, hypergradient, neumann
from ibau_jax.unlearning.inner import inner_loss
from ibau_jax.unlearning.outer import Deltas, OuterBatch, outer_loss
from tests.oracles import torch_ibau
from tests.oracles.twins import as_torch, randomised, torch_twin

STEP = 0.1


def quadratic(rng, size=6, width=4):
    """Inner loss ½ δᵀHδ − δᵀBθ and outer loss ½‖δ − t‖² + ½‖θ‖²; δ* = H⁻¹Bθ and everything is known."""
    root = rng.normal(size=(size, size))
    hessian = root @ root.T / size + np.eye(size)
    mixed, target = rng.normal(size=(size, width)), rng.normal(size=size)
    params, delta = rng.normal(size=width), rng.normal(size=size)

    def inner(delta, params):
        return 0.5 * delta @ jnp.asarray(hessian) @ delta - delta @ jnp.asarray(mixed) @ params

    def outer(delta, params):
        return 0.5 * jnp.sum((delta - jnp.asarray(target)) ** 2) + 0.5 * jnp.sum(params**2)

    return hessian, mixed, target, params, delta, inner, outer


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_reaches_the_closed_form(rng, solver):
    with jax.enable_x64(True):
        hessian, mixed, target, params, delta, inner, outer = quadratic(rng)
        expected = params + mixed.T @ np.linalg.solve(hessian, delta - target)
        terms = 2000 if solver == "neumann" else 40
        solve = SOLVERS[solver](terms) if solver != "neumann" else _long_neumann(terms)
        _, gradient = hypergradient(outer, inner, jnp.asarray(delta), jnp.asarray(params), step_size=STEP, solve=solve)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def _long_neumann(terms):
    """The same series in a loop: unrolling thousands of terms would take long to compile."""

    def solve(matvec, b):
        def step(_, v):
            return jax.tree.map(lambda v, av, b: v + av - b, v, matvec(v), b)

        return jax.lax.fori_loop(0, terms, step, jax.tree.map(jnp.zeros_like, b))

    return solve


@given(terms=st.integers(1, 12), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_neumann_series_is_cut_off_after_k_terms(terms, seed):
    with jax.enable_x64(True):
        hessian, mixed, target, params, delta, inner, outer = quadratic(np.random.default_rng(seed))
        v = np.zeros_like(delta)
        for _ in range(terms):  # v_{k+1} = (∂δΦ)ᵀ v_k + ∂δ L_out with ∂δΦ = I − ηH
            v = (np.eye(len(delta)) - STEP * hessian).T @ v + (delta - target)
        expected = params + STEP * mixed.T @ v  # ∂θΦ = ηB
        loss, gradient = hypergradient(
            outer, inner, jnp.asarray(delta), jnp.asarray(params), step_size=STEP, solve=neumann(terms)
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-10)
        np.testing.assert_allclose(loss, outer(delta, params), rtol=1e-12)


class TinyNet(nnx.Module):
    """Smooth, so that finite differences converge."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 3, (3, 3), padding=1, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, param_dtype=jnp.float64, rngs=rngs)
        self.out = nnx.Linear(3, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.norm(self.conv(x))).mean((1, 2)))


SPACES = {
    "pixel": Pixel(clip=False),
    "clipped pixel": Pixel(),
    "patch": Patch(),
    "warp": Warp(points=3),
    "wave": Wave(),
}
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=list(SPACES))


def of_space(space, rng):
    """Draws a perturbation where the space's maps are smooth: no pixel on the border, no flow of whole pixels."""
    delta = space.init(jax.random.key(0), (4, 4, 1))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.05, 0.2, leaf.shape)), delta)


def tiny_losses(rng, space=Pixel(clip=False)):  # noqa: B008 - frozen
    graph, params, rest = nnx.split(TinyNet(nnx.Rngs(0)), nnx.Param, ...)
    rest = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), rest)  # Flax keeps running statistics in float32
    images, labels = jnp.asarray(rng.random((5, 4, 4, 1))), jnp.asarray(rng.integers(0, 3, 5))
    anchors = of_space(space, rng)

    def cross_entropy(delta, params):
        logits = nnx.merge(graph, params, rest)(space.apply(delta, images))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))

    def inner(delta, params):
        # Strongly convex in δ, so that the fixed point exists and is found to machine precision.
        apart = jax.tree.map(lambda leaf, anchor: jnp.sum((leaf - anchor) ** 2), delta, anchors)
        return -cross_entropy(delta, params) + 2.0 * sum(jax.tree.leaves(apart))

    return params, inner, cross_entropy


@every_space
def test_total_derivative_through_a_net_matches_finite_differences(rng, space):
    """d/dθ L_out(δ*(θ), θ), with δ*(θ) found anew for every shifted θ."""
    with jax.enable_x64(True):
        params, inner, outer = tiny_losses(rng, space)
        step = jax.jit(gradient_step(inner, STEP))

        def solution(params):
            delta = of_space(space, np.random.default_rng(1))
            for _ in range(400):
                delta = step(delta, params)
            return delta

        _, gradient = hypergradient(outer, inner, solution(params), params, step_size=STEP, solve=_long_neumann(400))
        direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        shift = 1e-5
        values = [
            outer(solution(shifted), shifted)
            for shifted in (jax.tree.map(lambda p, d, s=s: p + s * shift * d, params, direction) for s in (1, -1))
        ]
        expected = (values[0] - values[1]) / (2 * shift)
        products = jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction))
        np.testing.assert_allclose(sum(products), expected, rtol=1e-6)
        # The part through δ* is ten times what may differ: without it the test could not fail.
        direct = jax.grad(outer, argnums=1)(solution(params), params)
        without = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), direct, direction)))
        assert abs(without - expected) > 1e-5 * abs(expected)


@every_space
def test_forward_rule_equals_reverse_over_reverse(rng, space):
    """The derivatives of Φ by the second-derivative symmetry, against plain jax.vjp of the plain gradient step."""
    with jax.enable_x64(True):
        params, inner, _ = tiny_losses(rng, space)
        delta, u = of_space(space, rng), of_space(space, rng)

        def plain_step(delta, params):
            return jax.tree.map(lambda d, g: d - STEP * g, delta, jax.grad(inner)(delta, params))

        plain = jax.vjp(plain_step, delta, params)[1](u)
        ours = jax.vjp(gradient_step(inner, STEP), delta, params)[1](u)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("terms", "clip"), [(5, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (5, False)))]
)
def test_small_vgg_matches_torch_autograd(rng, terms, clip):
    """The same K-term series on the published architecture, float32: relative error at most 1e-4.

    On a GPU, against the CPU's PyTorch, twice that: its sums of five products came to 1.04e-4 (H100).
    """
    limit = 1e-4 if jax.default_backend() == "cpu" else 2e-4
    model = randomised(SmallVGG(10, ImageSize(32, 32), nnx.Rngs(0)), rng)
    images, first_images = rng.random((2, 8, 32, 32, 3), np.float32)
    labels, first_labels = rng.integers(0, 10, (2, 8))
    delta = 0.3 * rng.normal(size=(1, 32, 32, 3)).astype(np.float32)
    mask = np.asarray([1, 0, 0, 1, 0, 0, 0, 0], np.float32)

    twin = torch_twin(model)
    loss, expected = torch_ibau.hypergradient(
        twin,
        as_torch(delta),
        (as_torch(images), torch.as_tensor(labels), torch.as_tensor(mask)),
        (as_torch(first_images), torch.as_tensor(first_labels)),
        terms=terms,
        clip=clip,
    )
    expected = dict(zip((name for name, _ in twin.named_parameters()), expected, strict=True))

    found_loss, gradient = our_hypergradient(
        model, delta, images, labels, mask, first_images, first_labels, terms, clip
    )
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-5)
    for path, leaf in nnx.to_flat_state(gradient):
        found, wanted = to_torch(path, np.asarray(leaf[...])), expected[torch_name(path)].numpy()
        # A convolution's bias before BatchNorm has a gradient like any other here, since the statistics are fixed.
        assert np.linalg.norm(found - wanted) <= limit * np.linalg.norm(wanted), torch_name(path)


def our_hypergradient(model, delta, images, labels, mask, first_images, first_labels, terms, clip):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    config = UnlearnConfig(clip=clip)
    forward = lambda params, x: nnx.merge(graph, params, rest)(x)  # noqa: E731
    ones = jnp.ones(len(labels))
    batch = Batches(jnp.asarray(images), jnp.asarray(labels), ones)
    first = Batches(jnp.asarray(first_images), jnp.asarray(first_labels), ones)

    @jax.jit
    def compute(params, delta):
        return hypergradient(
            partial(outer_loss, forward, config, outer=OuterBatch(batch, 0.1, jnp.asarray(mask))),
            lambda deltas, params: inner_loss(forward, config, deltas.untargeted, params, first),
            Deltas(delta, {}),
            params,
            step_size=config.fixed_point_step,
            solve=neumann(terms),
        )

    return compute(params, jnp.asarray(delta))
