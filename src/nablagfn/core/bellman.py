"""Bellman's equation for value gradients: one step back through the frozen model.

    ∇ log F̃(x_k) = J_{m_#}(x_k)ᵀ E[∇ log F̃(x_{k+1})]

derived in docs/nabla_db_lambda.md. The λ-return along a drawn path mixes an estimate V(x) with it:

    G_N = β∇r(x_N),   G_k = J_{m_#}(x_k)ᵀ v_{k+1},   v_k = (1−λ)·V(x_k) + λ·G_k,   v_N = G_N

λ = 0 bootstraps after one step; λ = 1 needs no V and is the lean adjoint of Adjoint Matching
(Domingo-Enrich et al. 2025). The return may also end early, after a window, on V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .kernels import KernelTable, Step
from .types import Condition, Policy, Selection, beside
from .value_gradient import ReferenceSignals


@dataclass(frozen=True)
class Pass:
    """One model's ε(x_k), evaluated once; its graph from x serves every Jacobian product at x_k.

    x, eps: [B, ...]; x requires grad. frozen: the pretrained model, not the finetuned one.
    """

    policy: Policy
    x: Tensor
    k: Step
    condition: Condition
    output: Tensor
    frozen: bool

    @staticmethod
    def at(policy: Policy, x: Tensor, k: Step, condition: Condition, *, frozen: bool) -> Pass:
        """Evaluate the model at x, once."""
        x = x.detach().requires_grad_()
        with _model(policy, frozen), torch.enable_grad():
            output = policy.output(x, k.here.time, condition)
        return Pass(policy, x, k, condition, output, frozen)

    def mean(self) -> Tensor:
        """m(x_k), [B, ...], with its graph."""
        with torch.enable_grad():
            return kernels.mean(self.x, self.output, self.k)

    def x_clean(self) -> Tensor:
        """x̂(x_k), [B, ...], with its graph."""
        with torch.enable_grad():
            return kernels.predict_clean(self.x, self.output, self.k.here)

    def product(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
        """Σ Jᵀ·cotangent over functions of (x, output), [B, ...], detached: one backward pass."""
        with _model(self.policy, self.frozen):
            (found,) = torch.autograd.grad(outputs, self.x, cotangents, retain_graph=True)
        return found

    def pull_back(self, v: Tensor) -> Tensor:
        """J_m(x_k)ᵀ v, [B, ...], detached: one backward pass."""
        return self.product([self.mean()], [v])


def _model(policy: Policy, frozen: bool) -> AbstractContextManager[None]:
    """Return the context in which `policy.output` is that model's."""
    return policy.reference() if frozen else nullcontext()


@dataclass(frozen=True)
class Backed:
    """What one step back found at x_k, [B, ...] each, or None where it was not asked for.

    mixed: v_k. rest: G_k less the guess, which is what g_φ is fitted to.
    """

    mixed: Tensor | None = None
    rest: Tensor | None = None


# (ε_# at x_k, v_{k+1}, whether x_k is the stretch's first sample, whose v_k nobody learns from)
Backup = Callable[[Pass, Tensor, bool], Backed]


def adjoint(here: Pass, v_next: Tensor, at_start: bool) -> Backed:
    """λ = 1 and nothing learned: v_k = G_k, the lean adjoint."""
    return Backed() if at_start else Backed(mixed=here.pull_back(v_next))


@dataclass(frozen=True)
class ReturnSignals(ReferenceSignals):
    """return_next: [M, ...] v_{k+1}. return_rest: [M, ...] at x_k, what g_φ is fitted to."""

    return_next: Tensor | None = None
    return_rest: Tensor | None = None


@dataclass(frozen=True)
class Returns:
    """Along a stretch of L transitions: v_k (`mixed`) [B, L+1, ...]; `rest` and ε_#(x_k)
    (`output_ref`) [B, L, ...]. Zero where the backup gave None.
    """

    mixed: Tensor
    rest: Tensor
    output_ref: Tensor


def returns(
    policy: Policy,
    table: KernelTable,
    x: Tensor,
    first: Tensor,
    condition: Condition,
    end: Tensor,
    backup: Backup,
) -> Returns:
    """One sweep back over a stretch of each path; the frozen model is evaluated once per sample.

    x: [B, L+1, ...] the samples x_first … x_{first+L}; first: [B] integers. end: [B, ...] v at the
    last of them.
    """
    length = x.shape[1] - 1
    mixed, rest = torch.zeros_like(x), torch.zeros_like(x[:, :length])
    output_ref = torch.zeros_like(rest)
    mixed[:, length] = end
    for j in range(length - 1, -1, -1):
        here = Pass.at(policy, x[:, j], table.at(first + j, x[:, j]), condition, frozen=True)
        output_ref[:, j] = here.output.detach()
        found = backup(here, mixed[:, j + 1], j == 0)
        del here  # its graph goes before the next comes
        if found.mixed is not None:
            mixed[:, j] = found.mixed
        if found.rest is not None:
            rest[:, j] = found.rest
    return Returns(mixed, rest, output_ref)


def sweep(
    chosen: Selection,
    first: Tensor,
    length: int,
    chunk: int,
    returns: Callable[[Tensor, Tensor, Condition], Returns],
) -> ReturnSignals:
    """The signals of the M chosen transitions.

    The returns are those over the stretch first .. first+length of each path, which holds its
    chosen transitions. first: [B] integers. chunk: paths at a time. returns:
    (x [b, length+1, ...], first [b], condition) -> Returns.
    """
    paths = chosen.paths
    parts = []
    for rows in torch.arange(len(paths.condition)).split(chunk):
        states = first[rows, None] + torch.arange(length + 1)
        x = paths.x[beside(rows[:, None], paths.x), beside(states, paths.x)]
        parts.append(returns(x, first[rows], paths.condition[rows]))
    row, j = beside(chosen.row, paths.x), beside(chosen.step - first[chosen.row], paths.x)
    return ReturnSignals(
        output_ref=torch.cat([part.output_ref for part in parts])[row, j],
        return_next=torch.cat([part.mixed for part in parts])[row, j + 1],
        return_rest=torch.cat([part.rest for part in parts])[row, j],
    )
