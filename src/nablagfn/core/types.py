"""Records and protocols that every other module speaks.

Shapes: M transitions, B trajectories, N denoising steps, `...` one sample (C, H, W for latents).
The letters are those of `docs/notation.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .schedules import Noising, Prediction

Metadata = Mapping[str, Any]


def beside(index: Tensor, like: Tensor) -> Tensor:
    """`index` on the device of `like`, without waiting for it; its dtype stays."""
    return index.to(like.device, non_blocking=True)


@dataclass(frozen=True)
class Condition:
    """What a batch of samples is conditioned on.

    prompts: one string per sample. metadata: one mapping per sample (may be empty mappings).
    tensors: what the model is given beside x and the time, by the model's own names, each [B, ...]:
    encoded prompts of one or several encoders, pooled ones, sizes. Empty for an unconditional one.
    """

    prompts: tuple[str, ...]
    metadata: tuple[Metadata, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor) -> Condition:
        """The samples named by `index` ([M] integers or [B] booleans), prompts included."""
        rows = torch.arange(len(self))[index.cpu()].tolist()
        return Condition(
            prompts=tuple(self.prompts[i] for i in rows),
            metadata=tuple(self.metadata[i] for i in rows),
            tensors={name: value[beside(index, value)] for name, value in self.tensors.items()},
        )

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """The samples of all parts, in order. All must have the same tensors."""
        return Condition(
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            metadata=tuple(entry for part in parts for entry in part.metadata),
            tensors={
                name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors
            },
        )


@dataclass(frozen=True)
class Judged:
    """What the reward of predicted clean samples tells of a pool's paths (`training.critic`).

    now, then, end: [B, N] the expected weight at each step, where that step is judged, and at the
    path's end. directions: [N, D, count] of the noise that counts; None: all.
    """

    now: Tensor
    then: Tensor
    end: Tensor
    directions: Tensor | None

    def __getitem__(self, index: Tensor) -> Judged:
        """Those of the paths named by `index` ([M] integers)."""
        here = beside(index, self.now)
        return replace(self, now=self.now[here], then=self.then[here], end=self.end[here])


@dataclass(frozen=True)
class Pooled:
    """What a pool knows of the paths that were taken from it (`training.pool`).

    output_ref: [B, N, ...] u_#(x_k); not of the first `fresh` steps, whose states are new. own: [B]
    booleans, True for the policy's own paths. weight: [B] w/q, their share of the target over the
    probability q by which they were taken; control: [B] 1/q. Both have mean 1 over what is taken.
    slope: [N] ρ_k (`kernels.bridge_slope`). effective: 0..1, the share of the pool that carries the
    weights. gradient: [B, N, ...] λ_{k+1} (`core.bellman`), without β; None where the objective
    asks for none. judged: over q, too; None without `pool.looks`.
    """

    output_ref: Tensor
    own: Tensor
    weight: Tensor
    control: Tensor
    slope: Tensor
    fresh: int = 0
    effective: float = 1.0
    gradient: Tensor | None = None
    judged: Judged | None = None

    def __getitem__(self, index: Tensor) -> Pooled:
        """Those of the paths named by `index` ([M] integers)."""
        here = beside(index, self.weight)
        return replace(
            self,
            output_ref=self.output_ref[here],
            own=self.own[here],
            weight=self.weight[here],
            control=self.control[here],
            gradient=None if self.gradient is None else self.gradient[here],
            judged=None if self.judged is None else self.judged[index],
        )


@dataclass(frozen=True)
class Trajectories:
    """Sampled paths: x [B, N+1, ...], noise to clean; output [B, N, ...], the model's u(x_k) when
    they were drawn.

    reward: [B] r(decode(x_N)), once it has been measured. pooled: of paths from a pool.
    """

    x: Tensor
    output: Tensor
    condition: Condition
    reward: Tensor | None = None
    pooled: Pooled | None = None

    def __getitem__(self, index: Tensor) -> Trajectories:
        """The trajectories named by `index` ([M] integers)."""
        here = beside(index, self.x)
        return Trajectories(
            x=self.x[here],
            output=self.output[here],
            condition=self.condition[index],
            reward=None if self.reward is None else self.reward[here],
            pooled=None if self.pooled is None else self.pooled[index],
        )

    @property
    def num_steps(self) -> int:
        return self.output.shape[1]

    @property
    def clean(self) -> Tensor:
        """[B, ...] the final samples x_N."""
        return self.x[:, -1]


SignalsT = TypeVar("SignalsT", bound="Signals")


@dataclass(frozen=True)
class Signals:
    """What an objective computed of whole trajectories for M transitions: nothing.

    One that needs something has a record of its own, which inherits from this one; its fields are
    tensors [M, ...], or None.
    """

    def __getitem__(self: SignalsT, index: Tensor) -> SignalsT:
        """Those of the transitions named by `index` ([n] integers)."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return type(self)(
            **{
                name: None if value is None else value[beside(index, value)]
                for name, value in values.items()
            }
        )


NO_SIGNALS = Signals()


@dataclass(frozen=True)
class Transitions:
    """M pairs (x_k, x_{k+1}) with their own prompts.

    x, x_next, output_old: [M, ...]; output_old is the output of the parameters θ† that drew the
    pair.
    step: [M] integers k in 0..N-1, on the CPU. signals: what `Objective.prepare` computed.
    """

    x: Tensor
    x_next: Tensor
    output_old: Tensor
    step: Tensor
    condition: Condition
    signals: Signals = NO_SIGNALS

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, index: Tensor) -> Transitions:
        """The transitions named by `index` ([M] integers, on the CPU)."""
        here = beside(index, self.x)
        return Transitions(
            x=self.x[here],
            x_next=self.x_next[here],
            output_old=self.output_old[here],
            step=self.step[index],
            condition=self.condition[index],
            signals=self.signals[index],
        )


@dataclass(frozen=True)
class Selection:
    """The data of one update: whole paths, and which transitions of them are learned from.

    row, step: [M] integers; transition i is step[i] of paths[row[i]]. seed: [M] integers, where
    an objective's own random numbers for a transition come from; None if none are needed. All on
    the CPU, so that choosing rows never waits for the device.
    """

    paths: Trajectories
    row: Tensor
    step: Tensor
    seed: Tensor | None = None

    def of_each(self, values: Tensor) -> Tensor:
        """[M, ...] of the transitions, from `values` [B, ...] of the paths."""
        return values[beside(self.row, values)]

    def transitions(self, signals: Signals = NO_SIGNALS) -> Transitions:
        """The chosen transitions with `signals` attached."""
        here, k = beside(self.row, self.paths.x), beside(self.step, self.paths.x)
        return Transitions(
            x=self.paths.x[here, k],
            x_next=self.paths.x[here, k + 1],
            output_old=self.paths.output[here, k],
            step=self.step,
            condition=self.paths.condition[self.row],
            signals=signals,
        )


@dataclass(frozen=True)
class Losses:
    """What an objective returns for M transitions.

    terms: weighted loss terms by name, each [M]; their sum over names is what is minimised.
    metrics: detached values by name, each [M], only logged. vectors: detached vectors by name, each
    [M, ...], of which the signal-to-noise ratio is logged.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        """[M] the sum of the terms."""
        return torch.stack(list(self.terms.values())).sum(0)


class Reward(Protocol):
    """A differentiable score; larger is better."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images: float32 [B, 3, H, W], nominally in [0, 1]; returns [B]."""
        ...


class Policy(Protocol):
    """A pretrained diffusion or flow model with a trainable adapter.

    together: every pass of `output`, forward and backward, is made by all processes at the same
    time, so none may leave one out. prediction: what `output` means. noising: the model's forward
    process.
    """

    together: bool
    sample_shape: tuple[int, ...]
    prediction: Prediction
    noising: Noising

    @property
    def device(self) -> torch.device: ...

    def times(self, grid: str, num_steps: int) -> Sequence[float]:
        """The model's times of `num_steps` steps on that grid (`samplers.Sampler.grid`), noisiest
        first, without the clean end. Raises ConfigError for a grid that it does not have."""
        ...

    def condition(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Condition: ...

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """u: the guided output in float32 (float64 for float64 x), [M, ...]; x [M, ...], time [M].

        Guidance is affine, so that of u is that of ε and of x̂.
        """
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside it the adapter is off: `output` is the frozen pretrained model's."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Clean samples to images [M, 3, H, W], nominally [0, 1], not clamped; differentiable."""
        ...

    def make_flow(
        self, widths: Sequence[int], layers_per_block: int, seed: int, *, hint: bool = False
    ) -> nn.Module:
        """A new g_φ(x, time, condition) for this policy's samples, exactly zero at start.

        hint: it takes x̂(x), of the shape of x, as a fourth argument.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """The options (dotted names) that this policy was built with, for the run's records."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters θ (the adapter's)."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write the adapter so that other software can load it."""
        ...


class View(Protocol):
    """How a policy's decoded samples are looked at: pictures, or points of a world."""

    def features(self, images: Tensor) -> Tensor:
        """[B, ...] decoded samples to [B, D], whose distances measure diversity."""
        ...

    def measures(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Further figures of a set of samples, by metric name."""
        ...

    def save(self, images: Tensor, prompts: Sequence[str], path: Path, columns: int) -> None:
        """Write a PNG that shows them."""
        ...


class Recogniser(Protocol):
    """An independent judge of what pictures show; never a reward."""

    def recognise(self, images: Tensor, prompts: Sequence[str]) -> list[bool | None]:
        """Whether each image [B, 3, H, W] shows what its prompt names; None where it names nothing
        that is known."""
        ...

    def predict(self, images: Tensor) -> Mapping[str, list[str]]:
        """What each image shows, by kind of label (style, background, …); empty if unknown."""
        ...


class Objective(Protocol):
    """Turns transitions into losses. It may own modules that are trained beside the policy.

    The trainer calls, per epoch, `observe`; per update, `choose` for each trajectory and `prepare`
    once; then `losses` per micro-batch. Implementations inherit the defaults from here.
    uses_reward_gradient: False where the reward's values are enough. carries_gradient: whether a
    pool is to keep the reward's gradient at every state of its paths.
    """

    modules: nn.ModuleDict
    uses_reward_gradient: bool = True
    carries_gradient: bool = False

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        """Which transitions of one trajectory to learn from: integers in 0..num_steps-1."""
        return torch.arange(num_steps)

    def observe(self, prompts: Sequence[str], reward: Tensor) -> None:
        """Told each epoch's prompts and rewards [B], of all processes in the same order."""
        return None

    def limit_rows(self, rows: int) -> None:
        """Take at most this many rows per forward pass from now on. Results stay the same."""
        return None

    def prepare(self, chosen: Selection) -> Signals:
        """What `losses` needs of whole trajectories, without graphs."""
        return NO_SIGNALS

    def losses(self, batch: Transitions) -> Losses: ...
