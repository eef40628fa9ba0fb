"""Looking at a run: fixed-seed grids while it trains, and the figures before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..evaluation import Evaluator, Measurement, Sample, summarise, summary_of
from ..evaluation.draws import DrawnSamples
from ..evaluation.reached import Reached, reached, without_pictures
from ..metrics.diversity import pairwise_distance
from ..metrics.drift import feature_drift
from ..prompts import PromptSet
from ..runs.advice import Rows, advise
from ..runs.progress import Bar
from ..runs.runfolder import RunFolder
from ..runtime.distributed import from_main_process
from .guard import Probe

ROWS = 8  # prompts shown of those measured before and after


@dataclass(frozen=True)
class Seen:
    """A measurement during training: by metric name, and what the guard judges by."""

    metrics: dict[str, float]
    probe: Probe


@dataclass(frozen=True)
class Ending:
    """The figures after a run, and beside its target where it has one."""

    after: Measurement | None = None
    against_target: Reached | None = None


class Observer:
    """Draws through the evaluator (on every process), writes on the main process."""

    def __init__(
        self,
        evaluator: Evaluator,
        folder: RunFolder,
        prompts: PromptSet,
        config: Config,
        *,
        show: bool,
    ) -> None:
        self.evaluator = evaluator
        self.folder = folder
        self.prompts = prompts
        self.config = config
        self.show = show
        self._base: list[Sample] | None = None
        self._before: DrawnSamples | None = None
        self._said: set[str] = set()

    def probe(self, epoch: int, bar: Bar, *, grid: bool) -> Seen:
        """Draw the fixed prompts and seeds and measure them; grid: keep the pictures, too."""
        bar.note("measuring")
        if self._base is None:  # drawn again after a restart: it is the same
            self._base = self._fixed(0, grid=self.config.logging.sample_freq > 0, reference=True)
        base, now = self._base, self._fixed(epoch, grid=grid, reference=False)
        figures = summarise(now, self.evaluator.view)
        probe = Probe(
            reward=figures.reward_mean,
            diversity=figures.diversity,
            path_kl=figures.path_kl,
            base_diversity=float(pairwise_distance(features_of(base), prompts_of(base))),
            held_out=figures.held_out,
            base_held_out_std={name: held_out_std(base, name) for name in figures.held_out},
        )
        bar.line(
            f"epoch {epoch}: reward {figures.reward_mean:.3f}, diversity {figures.diversity:.3f}"
            + ("" if figures.recognised is None else f", recognised {figures.recognised:.0%}")
        )
        named = {
            **figures.headline(),
            "gain": figures.reward_mean - mean_reward(base),
            "diversity_kept": probe.diversity_kept,
            "drift": float(feature_drift(features_of(now), features_of(base))),
        }
        return Seen({f"probe_{name}": value for name, value in named.items()}, probe)

    def _fixed(self, epoch: int, *, grid: bool, reference: bool) -> list[Sample]:
        """The fixed samples of the frozen model (`reference`) or of the policy as it is now."""
        each = self.config.logging.samples_per_prompt
        count = max(1, self.config.logging.num_samples // each)
        asked = repeat(self.prompts.spread(count), each)
        samples = self.evaluator.samples(asked, reference=reference)
        if grid:
            self._save_grid(samples, f"epoch_{epoch:05d}", 2 * each)
        return samples

    def advise(self, bar: Bar, rows: Rows, by_step: Rows) -> None:
        """Say, once each, what the figures logged so far give reason to."""
        if not self.show:
            return
        for advice in advise(rows, by_step):
            if advice.kind not in self._said:
                self._said.add(advice.kind)
                bar.line(f"advice: {advice.text}")

    def before(self) -> Measurement | None:
        """The frozen model's figures; measured once in the life of a run folder."""
        known = from_main_process(self._known())  # all measure, or none
        if "before" in known:
            return Measurement(**known["before"])
        self._before = self._measure("before")
        if self._before is None:
            return None
        figures = summary_of(self._before.measured)
        self._write({"before": figures.as_dict(), "updates": 0})
        return figures

    def after(self, update: int, beta: float | None) -> Ending:
        """The finetuned model's figures after `update` updates. beta: that of the target; None
        where there is no target."""
        known = from_main_process(self._known())
        if known.get("updates") == update and "after" in known:
            beside = known.get("against_target")
            return Ending(Measurement(**known["after"]), Reached.read(beside) if beside else None)
        drawn = self._measure("after")
        if drawn is None:
            return Ending()
        figures, beside = summary_of(drawn.measured), self._against_target(drawn, beta)
        against = beside.as_dict() if beside else None
        self._write({"after": figures.as_dict(), "against_target": against, "updates": update})
        return Ending(figures, beside)

    def _against_target(self, drawn: DrawnSamples, beta: float | None) -> Reached | None:
        """The finetuned model's samples beside the target of the pretrained model's."""
        if beta is None:
            return None
        if self._before is None:  # drawn again after a restart: it is the same
            self._before = self._measure("before")
        assert self._before is not None
        return reached(self._before, drawn, beta)

    def _known(self) -> dict[str, Any]:
        return self.folder.read_json("evaluation.json") or {}

    def _write(self, found: dict[str, Any]) -> None:
        """Put it into evaluation.json; None takes a part away."""
        if self.evaluator.accelerator.is_main_process:
            whole = {**self._known(), **found}
            kept = {name: part for name, part in whole.items() if part is not None}
            self.folder.write_json("evaluation.json", kept)

    def _measure(self, name: str) -> DrawnSamples | None:
        """Draw, measure and keep the grid; None when `evaluation.num_prompts` is 0."""
        wanted = self.config.evaluation
        if not wanted.num_prompts:
            return None
        prompts = tuple(dict.fromkeys(self.prompts.spread(wanted.num_prompts)))
        asked = repeat(prompts, wanted.images_per_prompt)
        with Bar(f"measuring {name}", len(asked), show=self.show) as bar:
            samples = self.evaluator.samples(
                asked, reference=name == "before", labelled=True, on_done=bar.advance
            )
        rows = PromptSet(prompts).spread(min(ROWS, len(prompts)))
        shown = [sample for row in rows for sample in samples if sample.prompt == row]
        self._save_grid(shown, name, wanted.images_per_prompt)
        return without_pictures(samples, self.evaluator.view)

    def _save_grid(self, samples: Sequence[Sample], name: str, columns: int) -> None:
        if self.evaluator.accelerator.is_main_process:
            images = torch.stack([sample.image for sample in samples])
            prompts = [sample.prompt for sample in samples]
            path = self.folder.grids / f"{name}.png"
            self.evaluator.view.save(images, prompts, path, columns)


def repeat(prompts: Sequence[str], times: int) -> list[str]:
    """Each prompt `times` times in a row."""
    return [prompt for prompt in prompts for _ in range(times)]


def held_out_std(samples: Sequence[Sample], name: str) -> float:
    """Standard deviation of a held-out reward over the samples."""
    return float(torch.tensor([sample.held_out[name] for sample in samples]).std())


def mean_reward(samples: Sequence[Sample]) -> float:
    """Mean over the samples; NaN where one reward is not known."""
    return sum(sample.reward for sample in samples) / len(samples)


def features_of(samples: Sequence[Sample]) -> Tensor:
    """Stack the samples' features in order, [n, D]."""
    return torch.stack([sample.feature for sample in samples])


def prompts_of(samples: Sequence[Sample]) -> list[str]:
    return [sample.prompt for sample in samples]
