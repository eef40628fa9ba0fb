"""The training loop: draw trajectories, choose transitions, minimise the objective, save.

It names no objective, no model and no reward: `Policy`, `Reward` and `Objective` are protocols.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .. import report
from ..config import Config, ConfigError, flatten, set_option
from ..core.counting import Counts, compilations, counted
from ..core.grids import late_start
from ..core.kernels import KernelTable
from ..core.path_kl import step_weights
from ..core.rollout import fingerprints
from ..core.transport import step_lengths
from ..core.types import Policy, Recogniser, Reward, Trajectories, View
from ..evaluation import Evaluator, Measurement, PictureView
from ..evaluation.reached import Reached
from ..methods.build import build_kernel, build_objective
from ..methods.parts import Parts
from ..methods.registry import check_settings, target_of
from ..prompts import PromptSet
from ..rewards import NamedReward, Scores, named
from ..runs import runfolder
from ..runs.progress import Bar, StopRequest, note
from ..runs.runfolder import RunFolder
from ..runtime import backoff, distributed
from ..runtime.optimizers import schedule_lr
from .checkpoint import CheckpointIO, Position, guard_factor, load_policy
from .draws import Shelf
from .guard import Guard
from .observe import Ending, Observer
from .pool import collector_of
from .runlog import RunLog, make_accelerator
from .updater import TrainingError, Updater, require_finite

POOL = "pool"  # folder of a run
IDENTITY = ("pretrained.model", "pretrained.family", "experiment.reward_fn")  # what was passed is
UNBUILT = {  # what an object has that says nothing of an option: the option's default
    key: value
    for key, value in flatten(Config()).items()
    if key.startswith(("speed.", "reward."))
    or key in ("training.gradient_checkpointing", "training.vae_checkpointing")
    if key != "speed.fused_optimizer"  # the trainer's own
}
Callback = Callable[[int, Mapping[str, Any]], object]  # (update, its row of metrics.jsonl)


def settle(config: Config, policy: Policy, reward: NamedReward) -> Config:
    """The options as they are really used: those of the objects that were passed in.

    Raises ConfigError, one line, for an option that was set and that the objects do not have.
    """
    config = config.model_copy(deep=True)
    has = {**UNBUILT, **reward.made_with, **policy.settings()}
    has["experiment.reward_fn"] = reward.name
    wanted, usual = flatten(config), flatten(Config())
    for key, value in has.items():
        if key not in IDENTITY and wanted[key] not in (value, usual[key]):
            raise ConfigError(
                f"config.{key}={wanted[key]!r}, but what was passed to Trainer has {value!r}: "
                "build it so, leave the option out, or let nablagfn.finetune build everything"
            )
        set_option(config, key, value)
    check_settings(config)
    return config


def check_device(policy: Policy, accelerator: Accelerator) -> None:
    """Raises ConfigError when the policy lies elsewhere than this process trains."""
    if policy.device.type != accelerator.device.type:
        raise ConfigError(
            f"the policy is on {policy.device.type}, this process trains on "
            f"{accelerator.device.type}: load the policy there"
        )


def check_shards(policy: Policy, config: Config) -> None:
    """Raises ConfigError when the config asks for shards and the policy is whole."""
    if config.training.shard_base and not policy.together:
        raise ConfigError(
            "config.training.shard_base=True, but the policy is whole: load it with "
            "StableDiffusionPolicy.from_pretrained(…, shard=True), or leave the option out"
        )


def check_measuring(
    config: Config, view: View | None, held_out: Mapping[str, Reward] | None
) -> None:
    """Raises ConfigError when the config names an extractor or rewards that were not passed."""
    usual, wanted = Config().evaluation, config.evaluation
    if view is None and wanted.extractor != usual.extractor:
        raise ConfigError(
            f"config.evaluation.extractor={wanted.extractor!r}, but Trainer was given no view: "
            "pass view=PictureView(load_extractor(…)), or let nablagfn.finetune build everything"
        )
    missing = [name for name in wanted.held_out_rewards if name not in (held_out or {})]
    if missing:
        raise ConfigError(
            f"config.evaluation.held_out_rewards has {missing[0]!r}, which was not passed to "
            "Trainer: pass held_out={name: reward}, or let nablagfn.finetune build everything"
        )


def steps_of(table: KernelTable) -> dict[str, list[float]]:
    """sampler.json: when the steps are, (c2/σ)², what each weighs in the path KL, and ᾱ.

    Without noise it is t_k − t_{k+1}, the weight in the transport cost."""
    weights = step_lengths(table) if table.ode else step_weights(table)
    return {
        "times": table.time[:-1].tolist(),
        "weights": weights.tolist(),
        "alpha_bar": table.schedule.alpha_bar[:-1].tolist(),
    }


class Stopped(Exception):
    """A stop was requested within an epoch; the run goes on from the epoch's start."""


@dataclass(frozen=True)
class RunResult:
    """What `fit` returns. before, after: None without `evaluation.num_prompts` or the end.
    against_target: None without a target, too."""

    folder: Path
    updates: int
    finished: bool
    before: Measurement | None = None
    after: Measurement | None = None
    against_target: Reached | None = None

    @property
    def report(self) -> Path:
        """The run's report.html."""
        return RunFolder(self.folder).report


class Trainer:
    """Finetunes `policy` towards p_pretrained·exp(β·reward).

    prompts: what the model is asked to draw. folder: the run folder (default:
    `saving.output_dir/REWARD_seedS`), continued when it holds a run with the same settings.
    view: how samples are measured and shown (default: as pictures, by the extractor inside the
    package). held_out: rewards to measure beside the trained one, by name. recogniser: who tells
    what pictures show. callbacks: called after each update on the main process, with its number and
    its row of metrics.jsonl; one that returns True ends the run after its epoch's last update.
    Raises ConfigError, before anything is written, when settings contradict each other, or for an
    option that the objects passed in do not have.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        prompts: PromptSet,
        config: Config,
        *,
        folder: RunFolder | None = None,
        accelerator: Accelerator | None = None,
        view: View | None = None,
        held_out: Mapping[str, Reward] | None = None,
        recogniser: Recogniser | None = None,
        callbacks: Sequence[Callback] = (),
        show_progress: bool = True,
    ) -> None:
        reward = named(reward)
        check_shards(policy, config)
        check_measuring(config, view, held_out)
        self.config = config = settle(config, policy, reward)
        self.policy, self.reward, self.prompts = policy, reward, prompts
        self.updates_per_epoch = config.updates_per_epoch() * config.training.num_inner_epochs
        self.folder = folder or runfolder.run_folder(config, "")
        if self.folder.exists:
            runfolder.check_same_settings(self.folder.config(), config, self.folder.path)
        self.accelerator = accelerator or make_accelerator(config, self.folder)
        check_device(policy, self.accelerator)
        self.show = show_progress and self.accelerator.is_main_process
        distributed.set_backend_flags(config)
        self.table = build_kernel(config, policy)
        self.counts = Counts()
        working = counted(policy, self.counts)
        self.guard = Guard(config.guard)
        parts = Parts(config, working, reward, prompts, self.table, lambda: self.guard.factor)
        self.objective = build_objective(parts)
        self.updater = Updater(self.accelerator, policy, self.objective, config)
        self.log = RunLog(self.accelerator, self.folder, config)
        shelf = Shelf(
            self.folder.path / POOL,
            self.accelerator.process_index,
            partial(distributed.any_process, self.accelerator),
        )
        self.collector = collector_of(
            parts,
            self.objective,
            shelf,
            world=self.accelerator.num_processes,
            over_processes=partial(distributed.mean, self.accelerator),
        )
        self.callbacks, self._enough = tuple(callbacks), False
        self.observer = self._make_observer(view, held_out, recogniser)
        self.checkpoints = CheckpointIO(
            self.folder.checkpoints,
            policy,
            self.objective.modules,
            self.updater.optimizer,
            self.updater.scaler,
            self.guard,
            limit=config.logging.num_checkpoint_limit,
        )

    def _make_observer(
        self,
        view: View | None,
        held_out: Mapping[str, Reward] | None,
        recogniser: Recogniser | None,
    ) -> Observer:
        config, wanted = self.config, self.config.evaluation
        evaluator = Evaluator(
            self.accelerator,
            self.policy,
            self.reward,
            self.table,
            batch_size=wanted.batch_size or config.sampling.batch_size,
            seed=wanted.seed,
            view=view or PictureView(),
            recogniser=recogniser,
            held_out=held_out,
            about=self.prompts.about,
        )
        prompts = self.prompts.evaluation
        return Observer(evaluator, self.folder, prompts, config, show=self.show)

    # ------------------------------------------------------------------ the run

    def fit(self) -> RunResult:
        """Train to `training.num_epochs`, or for `training.max_minutes`, continuing from the newest
        checkpoint if there is one.

        Raises TrainingError when the loss is no longer finite, or when one transition at a time
        is too much for the device's memory.
        """
        with self.folder.lock() if self.accelerator.is_main_process else nullcontext():
            try:
                return self._fit()
            except torch.OutOfMemoryError:
                advice = backoff.SAVE_MEMORY
                if self.policy.together:
                    advice = f"lower config.training.micro_batch, {advice}"
                raise TrainingError(f"out of memory: {advice}", alone=True) from None

    def _fit(self) -> RunResult:
        """`fit`, with the run folder held."""
        position = self._open_run()
        epochs = self.config.training.num_epochs
        before = self.observer.before()
        untold = self.config.speed.compiles
        with (
            StopRequest(show=self.show) as stop,
            Bar(
                "training", epochs * self.updates_per_epoch, position.update, show=self.show
            ) as bar,
        ):
            while not self._ended(position):
                if distributed.any_process(self.accelerator, self._enough):
                    self._save(position)
                    break
                start = self.checkpoints.snapshot(position)
                try:
                    position = self._epoch(position, bar, stop)
                except Stopped:
                    position = self.checkpoints.restore(start)
                    self._save(position)
                    break
                self._save_if_due(position)
                if untold:
                    bar.line(compilations())
                    untold = False
        finished = self._ended(position)
        ending = self._look_at_the_end(position) if finished else Ending()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            self.folder.truncate(position.update)
            report.build(self.folder)
        return RunResult(
            self.folder.path,
            position.update,
            finished,
            before,
            ending.after,
            ending.against_target,
        )

    def _ended(self, position: Position) -> bool:
        """Whether the run is over: by its epochs, its minutes, or the guard."""
        limit = 60 * self.config.training.max_minutes
        late = bool(limit) and distributed.any_process(self.accelerator, position.seconds >= limit)
        stopped = self.guard.state.stopped
        return late or stopped or position.epoch >= self.config.training.num_epochs

    def _open_run(self) -> Position:
        """Create or reopen the run folder; every process starts from the same position."""
        if self.accelerator.is_main_process:
            self.folder.write_json("versions.json", self._versions())
            self.folder.write_json("prompts.json", list(self.prompts.prompts))
            self.folder.write_json("held_out.json", list(self.prompts.held_out))
            if self.prompts.about or self.folder.about():
                self.folder.write_json(runfolder.ABOUT, dict(self.prompts.about))
            self.folder.write_json(runfolder.SAMPLER, steps_of(self.table))
            self.folder.write_json("config.json", self.config.model_dump(mode="json"))
        self.accelerator.wait_for_everyone()
        position = self.checkpoints.load_latest()
        if self.accelerator.is_main_process:
            self.folder.truncate(position.update)
        self._write_guard()
        self.log.open()
        if self.show and self.config.model.unet_reg_scale and self.updates_per_epoch == 1:
            note(
                "model.unet_reg_scale has no effect with one update per epoch, because the "
                "samples are drawn by the very parameters that are updated"
            )
        late = late_start(self.table, self.policy.noising)
        if self.show and late:
            note(late)
        return position

    def _versions(self) -> dict[str, str]:
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        processes = str(self.accelerator.num_processes)
        return {**runfolder.versions(), "device": name, "processes": processes}

    def _due(self, every: int, position: Position) -> bool:
        """True every `every` epochs and at the end; never for 0."""
        return every > 0 and (position.epoch % every == 0 or self._ended(position))

    def _save_if_due(self, position: Position) -> None:
        """Every `logging.save_freq` epochs, at the end, and what the guard wants to keep."""
        wanted = self.guard.best_checkpoint == runfolder.checkpoint_name(position.update)
        if self._due(self.config.logging.save_freq, position) or wanted:
            self._save(position)
            self._write_guard()

    def _write_guard(self) -> None:
        if self.accelerator.is_main_process and self.config.guard.active:
            self.folder.write_json(runfolder.GUARD, self.guard.state_dict())

    def _look_at_the_end(self, position: Position) -> Ending:
        """Measure the model that the run stands for, with the β that was in force for it."""
        update = self._take_best(position)
        factor = self.guard.factor
        if update != position.update:
            factor = guard_factor(self.folder.checkpoints / runfolder.checkpoint_name(update))
        return self.observer.after(update, target_of(self.config, factor).beta)

    def _take_best(self, position: Position) -> int:
        """Make the guard's best checkpoint, if there is one, the policy; the updates behind it."""
        best = self.guard.state.best
        if best is None or best["update"] == position.update:
            return position.update
        load_policy(self.policy, self.folder.checkpoints / best["checkpoint"])
        update: int = best["update"]
        return update

    def _save(self, position: Position) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.save(position)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------ one epoch

    def _epoch(self, position: Position, bar: Bar, stop: StopRequest) -> Position:
        """Draw samples with the parameters of now, update on them, log. May raise Stopped."""
        started = time.perf_counter() - position.seconds
        epoch, update, seconds = position.epoch, position.update, position.seconds
        drawn = self.collector.collect(epoch, partial(self._between, bar, stop))
        scores = self._scores(drawn) if drawn.reward is None else Scores(drawn.reward, {})
        drawn = replace(drawn, reward=scores.total)
        rewards = {**self._observe(drawn), **self._components(scores)}
        require_finite(rewards["reward"], "the reward", "check the reward function")
        bar.note(f"reward {rewards['reward']:.3g}")
        for inner in range(self.config.training.num_inner_epochs):
            for chosen in self.collector.batches(drawn, epoch, inner, self.objective):
                self._leave_if_asked(stop)
                total = self.config.training.num_epochs * self.updates_per_epoch
                schedule_lr(self.updater.optimizer, self.config.training, update / total)
                done = self.updater.update(chosen)
                row = {**rewards, **done.metrics, **self.counts.take()}
                update += 1
                seconds = time.perf_counter() - started
                if bar.advance() == (epoch + 1) * self.updates_per_epoch:
                    row |= self._look(Position(epoch + 1, update, seconds), bar)
                row = {"epoch": epoch + 1, **row, "seconds": round(seconds, 2)}
                self.log.write(update, row, done.by_step)
                self._tell(update, row)
        self.observer.advise(bar, self.log.rows, self.log.by_step)
        return Position(epoch + 1, update, seconds)

    def _tell(self, update: int, row: Mapping[str, Any]) -> None:
        """Call the callbacks, on the main process."""
        if self.accelerator.is_main_process:
            asked = [callback(update, row) is True for callback in self.callbacks]
            self._enough = self._enough or any(asked)

    def _look(self, position: Position, bar: Bar) -> dict[str, float]:
        """Measure fixed-seed samples where an epoch ends that wants it, and let the guard judge."""
        grid = self._due(self.config.logging.sample_freq, position)
        if not grid and not self._due(self.config.logging.eval_freq, position):
            return {}
        seen = self.observer.probe(position.epoch, bar, grid=grid)
        said = self.guard.judge(position.update, seen.probe)
        if said:
            bar.line(said)
        return seen.metrics

    def _between(self, bar: Bar, stop: StopRequest, done: int, total: int) -> None:
        """Before a batch of samples is drawn, `done` of `total`."""
        self._leave_if_asked(stop)
        bar.note(f"sampling {done + 1}/{total}" if total > 1 else "sampling")

    def _leave_if_asked(self, stop: StopRequest) -> None:
        """Raise Stopped on every process when one was asked to stop."""
        if distributed.any_process(self.accelerator, stop.requested):
            raise Stopped

    def _scores(self, drawn: Trajectories) -> Scores:
        """The reward of each trajectory's end, for its own prompt, and its components, [B] each."""
        found = []
        size = self.config.sampling.batch_size
        for rows in torch.arange(len(drawn.condition)).split(size):
            where = drawn.condition[rows]
            with torch.no_grad():
                images = self.policy.decode(drawn.clean[rows.to(drawn.x.device)])
                found.append(self.reward.scores(images.float(), where.prompts, where.metadata))
        return Scores(
            torch.cat([scores.total.float() for scores in found]),
            {name: torch.cat([scores.parts[name] for scores in found]) for name in found[0].parts},
        )

    def _observe(self, drawn: Trajectories) -> dict[str, float]:
        """Tell the objective this epoch's rewards; their figures, over all processes."""
        assert drawn.reward is not None
        noise = fingerprints(drawn.x[:, 0])
        mine = zip(drawn.condition.prompts, drawn.reward.tolist(), noise, strict=True)
        prompts, values, starts = zip(
            *distributed.gather(self.accelerator, list(mine)), strict=True
        )
        reward = torch.tensor(values, device=drawn.x.device)
        self.objective.observe(prompts, reward)
        found = {"reward": float(reward.mean()), "reward_std": float(reward.std(unbiased=False))}
        if drawn.pooled is None:
            return {**found, "duplicates": float(len(starts) - len(set(starts)))}
        effective = distributed.gather(self.accelerator, [drawn.pooled.effective])
        return {**found, "pool_ess": sum(effective) / len(effective)}

    def _components(self, scores: Scores) -> dict[str, float]:
        """Mean of each component of a composed reward, over all processes."""
        parts = {f"reward_{name}": value.mean() for name, value in scores.parts.items()}
        return distributed.average_metrics(self.accelerator, parts) if parts else {}
