"""The implicit hypergradient of I-BAU (Zeng et al., ICLR 2022, arXiv 2110.03735).

The inner solution δ*(θ) is the fixed point of one gradient step on the inner loss,

    Φ(δ, θ) = δ − η ∇δ L_in(δ, θ),        δ* = Φ(δ*, θ),

so by the implicit function theorem ∂δ*/∂θ = (I − ∂δΦ)⁻¹ ∂θΦ, and the outer loss has the hypergradient

    dL_out/dθ = ∂θ L_out + ∂δ L_out (I − ∂δΦ)⁻¹ ∂θΦ.

jaxopt attaches this rule to a "solver" that returns the δ it is given. This is the one module that imports jaxopt.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from ibau_jax.functional import Params, sequenced
from ibau_jax.perturbations.space import Perturbation

with warnings.catch_warnings():
    # jaxopt is finished, not broken: docs/design.md says why it is here and how it is fenced in.
    warnings.filterwarnings("ignore", message="JAXopt is no longer maintained", category=DeprecationWarning)
    from jaxopt import linear_solve
    from jaxopt.implicit_diff import custom_fixed_point

Loss = Callable[[Perturbation, Params], Float[Array, ""]]
Matvec = Callable[[Any], Any]
LinearSolver = Callable[[Matvec, Any], Any]


def neumann(terms: int) -> LinearSolver:
    """The Neumann series cut off after `terms` terms, K in the paper and at least 1: the published semantics.

    jaxopt asks for u with A u = b, where A = (∂δΦ)ᵀ − I and b = −∂δ L_out. From v₀ = 0, the series
    v_{k+1} = (∂δΦ)ᵀ v_k + ∂δ L_out is v + A v − b. The first step needs no product, since v₀ is zero. The loop is
    unrolled: there are convolutions in it, which are slow inside XLA:CPU's loops.
    """

    def solve(matvec: Matvec, b: Any) -> Any:
        v = jax.tree.map(lambda b: -b, b)
        for _ in range(terms - 1):
            v = jax.tree.map(lambda v, av, b: v + av - b, v, matvec(v), b)
        return v

    return solve


def _iterative(solver: Callable[..., Any]) -> Callable[[int], LinearSolver]:
    """One of jaxopt's solvers with at most `terms` iterations.

    A is −η ∇²L_in, negative definite at a minimum, and conjugate gradients ask for positive definite: −A u = −b.
    """

    def with_terms(terms: int) -> LinearSolver:
        def solve(matvec: Matvec, b: Any) -> Any:
            negated = jax.tree.map(lambda b: -b, b)
            return solver(lambda u: jax.tree.map(lambda a: -a, matvec(u)), negated, maxiter=terms)

        return solve

    return with_terms


def _gmres(matvec: Matvec, b: Any, maxiter: int) -> Any:
    """GMRES in one Krylov space of `maxiter` dimensions: jaxopt counts restarts."""
    return linear_solve.solve_gmres(matvec, b, restart=maxiter, maxiter=1)


SOLVERS: dict[str, Callable[[int], LinearSolver]] = {
    "neumann": neumann,
    "cg": _iterative(linear_solve.solve_cg),
    "normal_cg": _iterative(linear_solve.solve_normal_cg),
    "gmres": _iterative(_gmres),
    "bicgstab": _iterative(linear_solve.solve_bicgstab),
}


def gradient_step(
    inner_loss: Loss, step_size: float, *, recompute: bool = False
) -> Callable[[Perturbation, Params], Perturbation]:
    """Φ(δ, θ) = δ − η ∇δ L_in(δ, θ), whose derivatives are cheap (see `_symmetric_gradient`)."""
    gradient = _symmetric_gradient(inner_loss, recompute)
    return lambda delta, params: jax.tree.map(lambda d, g: d - step_size * g, delta, gradient(delta, params))


def _symmetric_gradient(loss: Loss, recompute: bool) -> Callable[[Perturbation, Params], Perturbation]:
    """∇δ L, with a reverse rule that is a forward derivative.

    Second derivatives are symmetric, so uᵀ ∂(∇δ L) is the derivative of ∇L = (∇δ L, ∇θ L) along u in δ. Linearised
    once, each product costs a forward pass and a backward pass instead of a reverse sweep over the reverse sweep.
    With `recompute` nothing is kept: each product costs the gradient once more, and takes its memory only.
    """

    def both(delta: Perturbation, params: Params) -> tuple[Perturbation, Params]:
        return jax.grad(loss, argnums=(0, 1))(delta, params)

    @jax.custom_vjp
    def gradient(delta: Perturbation, params: Params) -> Perturbation:
        return jax.grad(loss)(delta, params)

    def forward(delta: Perturbation, params: Params) -> tuple[Perturbation, Any]:
        if recompute:
            return jax.grad(loss)(delta, params), (delta, params)
        (gradient_delta, _), along = jax.linearize(lambda d: both(d, params), delta)
        return gradient_delta, along

    def backward(kept: Any, u: Perturbation) -> tuple[Perturbation, Params]:
        if not recompute:
            return kept(u)
        delta, params = kept
        return jax.jvp(lambda d: both(d, params), (sequenced(delta, u),), (u,))[1]

    gradient.defvjp(forward, backward)
    return gradient


def hypergradient(
    outer_loss: Loss,
    inner_loss: Loss,
    delta: Perturbation,
    params: Params,
    *,
    step_size: float,
    solve: LinearSolver,
    recompute: bool = False,
) -> tuple[Float[Array, ""], Params]:
    """L_out and its total derivative by θ through δ*(θ): the paper's implicit hypergradient.

    Args:
        outer_loss: L_out(δ, θ), a scalar.
        inner_loss: L_in(δ, θ), a scalar, twice differentiable where it matters.
        delta: δ*, the inner solution, any pytree of floats. It is taken as it is, solved exactly or not.
        params: θ, any pytree of floats.
        step_size: η of Φ.
        solve: the linear solver, `solve(matvec, b)`: `neumann(K)` or another of `SOLVERS`.
        recompute: linearise the inner gradient anew for every product, to spare memory.

    Returns:
        The outer loss, float (), and dL_out/dθ, shaped like `params`.
    """

    @custom_fixed_point(gradient_step(inner_loss, step_size, recompute=recompute), solve=solve)
    def inner_solution(delta: Perturbation, params: Params) -> Perturbation:
        return delta

    return jax.value_and_grad(lambda params: outer_loss(inner_solution(delta, params), params))(params)
