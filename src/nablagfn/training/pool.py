"""A pool of paths to learn from, instead of new ones each epoch.

Of each prompt it holds M paths of the pretrained model, drawn once, and if wanted some of the
policy's own, drawn now and then. With w = exp(βr)·p_#/p_drawn (1 for the pretrained model's own
paths), the weighted paths are the target's: for every function f of a path

    E_{p*}[f] = E_drawn[w·f] / E_drawn[w]

Weights are divided by their mean over a prompt's paths. The paths themselves are kept, with
u_#(x_k), and not their ends alone: noise that is added to an end makes states that the pretrained
sampler does not visit, but at its noisy steps (docs/pool.md). There, up to `pool.renoise`, states
are drawn anew for each use, so that they are not learned by heart, where nothing is known of the
path's own (`PoolCollector.fresh`).

RUN/pool/rank00_base_00.safetensors          the pretrained model's paths of a process, in parts
RUN/pool/rank00_epoch00010_00.safetensors    the policy's own, drawn at the start of that epoch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..config import Config, ConfigError
from ..core import kernels, rng
from ..core.bellman import adjoint, returns
from ..core.kernels import KernelTable
from ..core.log_reward import LogReward, differentiated
from ..core.path_kl import path_ratio
from ..core.rollout import rollout
from ..core.start import FirstState
from ..core.types import Condition, Judged, Objective, Policy, Pooled, Trajectories, beside
from ..methods.parts import Parts
from ..methods.registry import source_of
from ..metrics.tilting import systematic
from ..prompts import PromptSet
from ..runtime import backoff
from . import critic, linear
from .collect import Between, Collector, ignored
from .draws import Draw, Kept, Shelf, identity
from .updater import require_finite

Found = TypeVar("Found")
Mean = Callable[[Tensor], Tensor]

PARTS = 32  # files of a draw, at most
MEASURED = 4096  # paths whose directions are taken, at most


def alone(value: Tensor) -> Tensor:
    """The mean over the processes where there is one."""
    return value


def mean_one(log_w: Tensor, slot: Tensor) -> Tensor:
    """Weights [n] float32 from their logarithms, divided by their mean over each slot's paths."""
    return (log_w - log_mean(log_w, slot, int(slot.max()) + 1)[slot]).exp().float()


def log_mean(log_w: Tensor, slot: Tensor, count: int) -> Tensor:
    """log of the mean weight of each of `count` slots, [count]."""
    most = log_w.new_full((count,), -math.inf).scatter_reduce(0, slot, log_w, "amax")
    total = log_w.new_zeros(count).index_add(0, slot, (log_w - most[slot]).exp())
    return most + (total / slot.bincount(minlength=count)).log()


def slopes(draw: Draw, table: KernelTable) -> Tensor:
    """ρ_k of each step, [N] float32, over the pretrained model's paths."""
    found = [
        kernels.bridge_slope(
            draw.x[:, step],
            draw.x[:, step + 1],
            draw.x[:, -1],
            draw.output_ref[:, step],
            table.at_step(step, draw.x[:, step]),
        )
        for step in range(table.num_steps)
    ]
    return torch.tensor(found)


def picked(draws: Sequence[Draw], rows: Tensor) -> Draw:
    """The paths `rows` [m], ascending, of all draws together."""
    ends = torch.tensor([len(draw.slot) for draw in draws]).cumsum(0)
    parts = []
    for draw, end in zip(draws, ends.tolist(), strict=True):
        start = end - len(draw.slot)
        parts.append(draw.at(rows[(rows >= start) & (rows < end)] - start))
    return Draw.cat(parts)


@dataclass(frozen=True)
class Shares:
    """weight: [n] w, mean 1 over each prompt's paths. probability: [n] q of being taken, mean 1."""

    weight: Tensor
    probability: Tensor

    @staticmethod
    def of(log_w: Tensor, slot: Tensor, tilt: float) -> Shares:
        """q = 1 − τ + τw: with τ = ½ no w/q exceeds 2, and w = 0 is taken, too, for the control."""
        weight = mean_one(log_w, slot)
        return Shares(weight, 1 - tilt + tilt * weight)

    @property
    def effective(self) -> float:
        """Effective share of the paths, in 0..1."""
        return float(self.weight.sum().square() / (len(self.weight) * self.weight.square().sum()))


@dataclass(frozen=True)
class CourseAt:
    """What a course says at one β. start: the mean of the first state; None: 0."""

    beta: float
    judged: Judged
    start: Tensor | None


class PoolCollector(Collector):
    """Takes each epoch's paths from the pool of this process, which it fills when needed.

    log_reward: gives β at the moment; its decoder and its pieces are used for the rewards.
    gradients: which are wanted: "carried" back along the paths, of a "linear" fit of the reward
    (`training.linear`), or "none". shelf: keeps the pool (RUN/pool). over_processes: the mean of a
    tensor over all of them.
    """

    def __init__(
        self,
        policy: Policy,
        table: KernelTable,
        prompts: PromptSet,
        config: Config,
        *,
        log_reward: LogReward,
        gradients: str,
        shelf: Shelf,
        world: int = 1,
        over_processes: Mean = alone,
    ) -> None:
        super().__init__(policy, table, prompts, config, rank=shelf.rank, world=world)
        self.log_reward = log_reward
        self.gradients = gradients
        looks = config.pool.looks
        self.looks = critic.looks_at(table.schedule.alpha_bar, looks)
        if looks and not self.looks:
            raise ConfigError(
                f"config.pool.looks={looks}, but no step of this sampler begins with a share of "
                f"{critic.SEEN[0]} to {critic.SEEN[1]} of signal: set it to 0, or "
                f"config.sampling.num_steps higher"
            )
        self.spans, self.to_the_end = (
            critic.Spans.of(self.looks, table.num_steps, ahead) for ahead in (config.pool.ahead, 0)
        )
        self.shelf = shelf
        self.over_processes = over_processes
        self.first = self._first_state()
        self.slots = self._slots()
        self._base: Draw | None = None
        self._slope = torch.ones(table.num_steps)
        self._directions: Tensor | None = None
        self._course: linear.Course | None = None
        self._fitted: CourseAt | None = None
        self._own: dict[int, Draw] = {}  # by epoch
        self._rows = config.training.micro_batch or config.training.batch_size

    def _first_state(self) -> FirstState | None:
        """That of the policy, where it is to be moved. Raises ConfigError for one without."""
        if not self.config.pool.shift_start or self.gradients != "linear":
            return None
        if float(self.table.schedule.alpha[0]) == 0:
            raise ConfigError(
                "config.pool.shift_start=True has no use in "
                f"{self.config.pretrained.model}, whose first state is noise without any signal: "
                "set it to False"
            )
        first = getattr(self.policy, "first", None)
        if not isinstance(first, FirstState):
            raise ConfigError(
                "config.pool.shift_start=True needs a policy with a `first` (nablagfn.core.start."
                "FirstState), which that of config.pretrained.model="
                f"{self.config.pretrained.model!r} has not: set it to False"
            )
        return first

    def _slots(self) -> tuple[str, ...]:
        """The prompts of this process's pool: those of the set in shuffled rounds."""
        s, known = self.config.pool, self.prompts.prompts
        count = s.size // s.images_per_prompt
        found: list[str] = []
        for turn in range((self.rank + 1) * count // len(known) + 1):
            order = rng.generator(self.config.seed, "pool-prompts", turn)
            found += [known[i] for i in torch.randperm(len(known), generator=order).tolist()]
        return tuple(found[self.rank * count : (self.rank + 1) * count])

    # ---------------------------------------------------------------- taking

    def collect(self, epoch: int, between: Between = ignored) -> Trajectories:
        """This epoch's paths, by their share of the target (`Shares`)."""
        draws = self._filled(epoch, between)
        slot = torch.cat([draw.slot for draw in draws])
        log_weight = torch.cat([self._log_weight(draw) for draw in draws])
        shares = Shares.of(log_weight, slot, self.config.pool.tilt)
        judged = self._judged(draws) if self.looks or self._course else None
        s = self.config.sampling
        generator = rng.generator(self.config.seed, "pool", epoch, self.rank)
        u = float(torch.rand(1, generator=generator, dtype=torch.float64))
        share = shares.probability.double()
        rows = systematic(share / share.sum(), s.batch_size * s.num_batches_per_epoch, u)
        taken = self._taken(picked(draws, rows), shares, judged, rows)
        return self._renoised(taken, rng.generator(self.config.seed, "renoise", epoch, self.rank))

    @property
    def fresh(self) -> int:
        """The number of steps from states that are drawn anew: the noisiest, never the last. None
        where something is known of the path's own."""
        limit = 0.0 if self.looks or self.gradients != "none" else self.config.pool.renoise
        noisy = int((self.table.schedule.alpha_bar[:-1] <= limit).sum()) if limit else 0
        return min(noisy, self.table.num_steps - 1)

    def _renoised(self, paths: Trajectories, generator: torch.Generator) -> Trajectories:
        """The paths with new states before step `fresh`, by the forward process from x_fresh."""
        x = paths.x.clone()
        for step in range(self.fresh - 1, -1, -1):
            noise = torch.randn(x[:, 0].shape, generator=generator).to(x.device, x.dtype)
            x[:, step] = kernels.renoise(x[:, step + 1], noise, self.table.at_step(step, noise))
        return replace(paths, x=x)

    def _log_weight(self, draw: Draw) -> Tensor:
        """log w = β·r − log p_drawn/p_#, [n] float64."""
        return self.log_reward.of(draw.reward.double()) - draw.log_ratio.sum(1)

    def _judged(self, draws: Sequence[Draw]) -> Judged:
        """ĥ of the pretrained model's paths, the first draw, and with its curves of the policy's
        own."""
        base, of = draws[0], self.log_reward.of
        count = len(self.slots)
        log_w = of(base.reward.double())
        log_z = log_mean(log_w, base.slot, count)
        if self._course:
            return self._expected(self._course, (log_w - log_z[base.slot]).exp())
        curves: list[critic.ExpectedWeight] = []
        found = []
        for draw in draws:
            weight = (of(draw.reward.double()) - log_z[draw.slot]).exp()
            scores = of(draw.seen.double()) - log_z[draw.slot, None]
            if draw is base:
                curves = [critic.ExpectedWeight.fit(score, weight) for score in scores.unbind(1)]
            value = critic.values(scores, weight, curves)
            found.append(
                [
                    critic.judged(value, draw.log_ratio, spans, draw is not base)
                    for spans in (self.spans, self.to_the_end)
                ]
            )
        near, far = zip(*found, strict=True)
        return Judged(
            torch.cat([now for now, _ in near]),
            torch.cat([then for _, then in near]),
            torch.cat([end for _, end in far]),
            self._directions,
        )

    def _expected(self, course: linear.Course, weight: Tensor) -> Judged:
        """ĥ by the linear fit and the steps along it, fitted again when β has changed; the policy's
        first state is moved with them."""
        beta = float(self.log_reward.of(torch.ones((), dtype=torch.float64)))
        if self._fitted is None or beta != self._fitted.beta:
            judged = course.judged(weight, beta, self.table.num_steps)
            self._fitted = CourseAt(beta, judged, self._start(course, weight, beta))
        if self.first is not None:  # each time: a policy may have gone back to an older state
            self.first.mean = self._fitted.start
        return self._fitted.judged

    def _start(self, course: linear.Course, weight: Tensor, beta: float) -> Tensor | None:
        """The mean of the first state, the same in all processes; None where it stays 0."""
        if self.first is None:
            return None
        mean = course.start(weight, beta, self.table.start_std)
        found = self.over_processes(mean.to(self.policy.device))
        what = "the mean of the first state"  # the loss would never tell
        require_finite(float(found.sum()), what, "set config.pool.shift_start=False")
        return found

    def _taken(
        self, draw: Draw, shares: Shares, judged: Judged | None, rows: Tensor
    ) -> Trajectories:
        """The paths `draw`, `rows` of the pool, on the policy's device."""

        def here(value: Tensor) -> Tensor:
            return value.to(self.policy.device, non_blocking=True)

        def over_share(value: Tensor) -> Tensor:
            return here((value / shares.probability[:, None])[rows])

        asked = [self.slots[i] for i in draw.slot.tolist()]
        return Trajectories(
            here(draw.x),
            here(draw.output),
            self.policy.condition(asked, self.prompts.metadata(asked)),
            here(draw.reward),
            Pooled(
                here(draw.output_ref),
                (rows >= self.config.pool.size).to(self.policy.device),  # own ones come after
                here((shares.weight / shares.probability)[rows]),
                here((1 / shares.probability)[rows]),
                self._slope.to(self.policy.device),
                self.fresh,
                shares.effective,
                here(draw.gradient) if self.gradients != "none" else None,
                judged
                and replace(
                    judged,
                    now=over_share(judged.now),
                    then=over_share(judged.then),
                    end=over_share(judged.end),
                ),
            ),
        )

    # ---------------------------------------------------------------- filling

    def _filled(self, epoch: int, between: Between) -> list[Draw]:
        """All paths that are learned from in this epoch, the pretrained model's first."""
        s = self.config.pool
        if self._base is None:
            self._base = self._drawn(None, between)
            self._measure(self._base)
            if self.gradients == "linear":
                self._base = self._with_field(self._base, between)
        own = round(s.own_share * s.images_per_prompt)
        if not own:
            return [self._base]
        last = epoch - epoch % s.refresh
        wanted = range(last, 0, -s.refresh)[: s.keep_draws]  # none at the start: nothing learned
        for at in reversed(wanted):
            if at not in self._own:
                self._forget(epoch)
                self._own[at] = self._drawn(at, between)
        self._own = {at: self._own[at] for at in wanted}
        return [self._base, *self._own.values()]

    def _forget(self, epoch: int) -> None:
        """Delete own draws that not even the newest checkpoint goes on with."""
        s = self.config.pool
        saved = max(0, epoch - self.config.logging.save_freq)
        oldest = saved - saved % s.refresh - (s.keep_draws - 1) * s.refresh
        self.shelf.forget(f"epoch{max(0, oldest):05d}")

    def _measure(self, base: Draw) -> None:
        """What the pretrained model's paths tell of all."""
        self._slope = slopes(base, self.table)
        if self.looks:
            some = slice(None, None, math.ceil(len(base.x) / MEASURED))
            found = critic.directions(
                base.x[some], base.output_ref[some], self.table, self.config.pool.directions
            )
            self._directions = None if found is None else found.to(self.policy.device)

    def _drawn(self, epoch: int | None, between: Between) -> Draw:
        """Paths of the pretrained model (epoch None), or of the policy as it is now."""
        s = self.config.pool
        each = s.images_per_prompt if epoch is None else round(s.own_share * s.images_per_prompt)
        slot = torch.arange(len(self.slots)).repeat_interleave(each)
        return self._in_parts(
            "base" if epoch is None else f"epoch{epoch:05d}",
            Draw,
            len(slot),
            lambda rows: self._identity(rows, slot, epoch),
            lambda rows: self._measured(slot[rows], rows + self.rank * len(slot), epoch),
            between,
        )

    def _in_parts(
        self,
        name: str,
        kind: type[Kept],
        paths: int,
        of: Callable[[Tensor], str],
        make: Callable[[Tensor], Kept],
        between: Between,
    ) -> Kept:
        """The record that is kept by that name of so many paths, made a batch at a time.

        It is kept in parts, each of which knows what it is of, so that a filling that is cut off
        goes on where it was.
        """
        batches = torch.arange(paths).split(self.config.sampling.batch_size)
        size = math.ceil(len(batches) / PARTS)

        def part(first: int) -> Kept:
            found = []
            for i, rows in enumerate(batches[first : first + size], first):
                between(i, len(batches))
                found.append(make(rows))
            return kind.cat(found)

        return kind.cat(
            [
                self.shelf.kept(
                    f"{name}_{first // size:02d}",
                    of(torch.cat(batches[first : first + size])),
                    kind,
                    partial(part, first),
                )
                for first in range(0, len(batches), size)
            ]
        )

    def _identity(self, rows: Tensor, slot: Tensor, epoch: int | None) -> str:
        """Of the paths `rows` of a draw: what else they would be other paths for."""
        return identity(
            prompts=[self.slots[i] for i in slot[rows].tolist()],
            first=int(rows[0]),
            epoch=epoch,
            seed=self.config.seed,
            times=self.table.time.tolist(),
            looks=self.looks,
            gradients="carried" if self.gradients == "carried" else "none",
        )

    def _measured(self, slot: Tensor, indices: Tensor, epoch: int | None) -> Draw:
        """One batch of paths with their rewards, on the CPU."""
        asked = [self.slots[i] for i in slot.tolist()]
        condition = self.policy.condition(asked, self.prompts.metadata(asked))
        base = epoch is None
        noise = rng.normal(
            (self.table.num_steps + 1, *self.policy.sample_shape),
            indices.tolist(),
            seed=self.config.seed,
            purpose="pool-base" if epoch is None else "pool-own",
            step=epoch or 0,
        )
        with self.policy.reference() if base else nullcontext():
            paths = rollout(self.policy, self.table, noise, condition)
        output = output_ref = paths.output.cpu()
        log_ratio = torch.zeros(len(slot), self.table.num_steps, dtype=torch.float64)
        if not base:
            found = path_ratio(self.policy, self.table, paths, keep_reference=True)
            assert found.output_ref is not None
            output_ref, log_ratio = found.output_ref.cpu(), found.log_ratio.double().cpu()
        reward, gradient = self._rewards(paths)
        seen = self._seen(paths, output_ref)
        found_of = {"reward": reward, "reward of a prediction": seen, "reward's gradient": gradient}
        for name, value in found_of.items():
            require_finite(float(value.sum()), f"the {name}", "check the reward function")
        return Draw(paths.x.cpu(), output, output_ref, slot, reward, seen, log_ratio, gradient)

    # ---------------------------------------------------------------- the linear fit

    def _with_field(self, base: Draw, between: Between) -> Draw:
        """The pretrained model's paths with J_x̂ᵀa where the steps end at which the LoRA acts."""
        fitted = linear.LinearReward.fit(base.x[:, -1], base.reward)
        if self.rank == 0:
            print(
                f"pool: a linear fit over {len(base.slot)} finished samples explains "
                f"{max(fitted.explained, 0.0):.0%} of the reward (each left out)"
            )
        slope = fitted.slope.double().sum().item()
        field = self._in_parts(
            "linear",
            linear.Field,
            len(base.slot),
            lambda rows: identity(
                paths=self._identity(rows, base.slot, None),
                ends=self.acting,
                slope=slope,
                first=self.first is not None,
            ),
            lambda rows: self._field(base.at(rows), fitted.slope),
            between,
        )
        self._course = linear.Course.of(base, field)
        return field.padded(base)

    @property
    def acting(self) -> int:
        """The number of steps, from the noisiest, in which the LoRA acts."""
        return self.table.steps_until(self.config.model.lora_until)

    def _field(self, draw: Draw, slope: Tensor) -> linear.Field:
        """Of one batch of paths, on the CPU."""

        def attempt(size: int) -> linear.Field:
            rows = torch.arange(len(draw.slot)).split(size)
            return linear.Field.cat([self._field_of(draw.at(some), slope) for some in rows])

        return self._fitting(attempt)

    def _field_of(self, draw: Draw, slope: Tensor) -> linear.Field:
        """The same, all rows at a time."""
        asked = [self.slots[i] for i in draw.slot.tolist()]
        condition = self.policy.condition(asked, self.prompts.metadata(asked))
        scores, gradients = [], []
        if self.first is None:  # no gradient is asked for where no step ends
            k = self.table.at_step(0, draw.x[:, 0])
            known = kernels.predict_clean(draw.x[:, 0], draw.output_ref[:, 0], k.here)
            scores.append((known * slope).flatten(1).sum(1))
        slope = slope.to(self.policy.device)
        for step in range(len(scores), self.acting + 1):
            x = draw.x[:, step].to(self.policy.device).requires_grad_()
            with torch.enable_grad(), self.policy.reference():
                clean = self._predicted(x, step, condition)
                score = (clean * slope).flatten(1).sum(1)
                (gradient,) = torch.autograd.grad(score.sum(), x)
            scores.append(score.detach().cpu())
            gradients.append(gradient.cpu())
        first = gradients.pop(0) if self.first is not None else torch.zeros(len(draw.x), 0)
        return linear.Field(torch.stack(scores, 1), torch.stack(gradients, 1), first)

    def _predicted(self, x: Tensor, step: int, condition: Condition) -> Tensor:
        """x̂(x_k), [n, ...]; of the end of a path x_N itself."""
        if step == self.table.num_steps:
            return x
        k = self.table.at_step(step, x)
        return kernels.predict_clean(x, self.policy.output(x, k.here.time, condition), k.here)

    def _seen(self, paths: Trajectories, output_ref: Tensor) -> Tensor:
        """r of what u_# predicts of the clean sample at each look, [n, looks] on the CPU."""
        found = [paths.x.new_zeros(len(paths.x), 0)]
        raw = self.log_reward.plain()
        for step in self.looks:
            x = paths.x[:, step]
            k = self.table.at_step(step, x)
            predicted = kernels.predict_clean(x, output_ref[:, step].to(x.device), k.here)
            with torch.no_grad():
                found.append(raw(predicted, paths.condition).float()[:, None])
        return torch.cat(found, 1).cpu()

    def _rewards(self, paths: Trajectories) -> tuple[Tensor, Tensor]:
        """r [n] float32 of the ends and λ_{k+1} [n, N, ...] of all steps, on the CPU; [n, 0]
        without gradients."""
        return self._fitting(lambda size: self._rewards_by(paths, size))

    def _fitting(self, attempt: Callable[[int], Found]) -> Found:
        """attempt(rows at a time), with fewer where memory runs out."""
        if self.policy.together:  # other processes make the same passes
            return attempt(self._rows)
        found = backoff.fit(attempt, self._rows, print)
        self._rows = found.rows
        return found.value

    def _rewards_by(self, paths: Trajectories, size: int) -> tuple[Tensor, Tensor]:
        """The same, `size` paths at a time."""
        raw = self.log_reward.plain()
        rewards, gradients = [], []
        for rows in torch.arange(len(paths.condition)).split(size):
            x, condition = paths.x[beside(rows, paths.x)], paths.condition[rows]
            if self.gradients != "carried":
                with torch.no_grad():
                    rewards.append(raw(x[:, -1], condition).float().cpu())
                continue
            with torch.enable_grad():
                found = differentiated(raw, x[:, -1].detach(), condition)
            rewards.append(found.value.float().cpu())
            first = torch.zeros(len(x), dtype=torch.long)
            carried = returns(self.policy, self.table, x, first, condition, found.gradient, adjoint)
            gradients.append(carried.mixed[:, 1:].cpu())
        reward = torch.cat(rewards)
        return reward, torch.cat(gradients) if gradients else reward.new_zeros(len(reward), 0)


def collector_of(
    parts: Parts,
    objective: Objective,
    shelf: Shelf,
    *,
    world: int = 1,
    over_processes: Mean = alone,
) -> Collector:
    """What gives the run its paths: new ones, or a pool's that is kept on the shelf."""
    if source_of(parts.config) == "paths":
        return Collector(
            parts.policy, parts.table, parts.prompts, parts.config, rank=shelf.rank, world=world
        )
    return PoolCollector(
        parts.policy,
        parts.table,
        parts.prompts,
        parts.config,
        log_reward=parts.log_reward,
        gradients=parts.config.pool.gradient if objective.carries_gradient else "none",
        shelf=shelf,
        world=world,
        over_processes=over_processes,
    )
