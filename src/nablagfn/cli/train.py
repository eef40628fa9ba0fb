"""`nablagfn train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config, ConfigError, set_option
from ..methods.registry import check_settings
from ..recipes.options import apply_overrides, load_config
from .common import command, fail

if TYPE_CHECKING:
    from ..evaluation import Measurement
    from ..evaluation.reached import LabelShares, Reached
    from ..runs.runfolder import RunFolder
    from ..training.trainer import RunResult

BESIDE = 52  # the column of what stands beside the reward and the diversity


def add(commands: Any) -> None:
    parser = command(
        commands,
        "train",
        train,
        help="finetune a model (continues the same run when started again)",
        options=True,
    )
    parser.add_argument("--seed", type=int, default=None, help="seed of the run (default 0)")
    parser.add_argument("--exp_name", default="", help="name of the experiment, for the run folder")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: continue the run if its folder exists; never: a new folder; must: or fail",
    )


def resolve_config(arguments: argparse.Namespace, rest: Sequence[str]) -> Config:
    """Config file, then overrides, then --seed."""
    config = load_config(arguments.config) if arguments.config else Config()
    apply_overrides(config, rest)
    if arguments.seed is not None:
        set_option(config, "seed", arguments.seed)
    check_settings(config)
    return config


def choose_folder(config: Config, exp_name: str, resume: str) -> RunFolder:
    """Choose the run folder by the --resume policy. Raises ConfigError for `must` without a run."""
    from ..runs.runfolder import check_same_settings, fresh_folder, run_folder

    folder = run_folder(config, exp_name)
    if resume == "never":
        return fresh_folder(folder)
    if resume == "must" and not folder.exists:
        raise ConfigError(f"--resume=must: there is no run in {folder.path}")
    if folder.exists:
        check_same_settings(folder.config(), config, folder.path)
    return folder


def train(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Everything is checked before the run folder is made."""
    config = resolve_config(arguments, rest)
    folder = choose_folder(config, arguments.exp_name, arguments.resume)
    from ..commands.assemble import build_trainer
    from ..training.trainer import TrainingError

    trainer = build_trainer(config, folder)
    try:
        result = trainer.fit()
    except TrainingError as error:
        fail(str(error), alone=error.alone)
    if trainer.accelerator.is_main_process:
        summarise(result)


def summarise(result: RunResult) -> None:
    """Print before and after, beside the target where it is known, and where the report is."""
    if not result.finished:
        print(f"stopped after update {result.updates}; the same command continues it")
    before, after, beside = result.before, result.after, result.against_target
    if before and after:
        if beside is not None and beside.target_reward is not None:
            print(*target_lines(before, after, beside), sep="\n")
        else:
            print(*plain_lines(before, after), sep="\n")
        for name, value in after.others.items():
            print(f"{name:<22} {before.others[name]:8.4f} -> {value:8.4f}")
        if beside is not None and beside.target_reward is None:
            print(
                f"target not known from {beside.samples} samples (effective "
                f"{beside.effective_samples:.0f}): draw more with "
                "--config.evaluation.images_per_prompt"
            )
    print(f"report: {result.report}")


def plain_lines(before: Measurement, after: Measurement) -> list[str]:
    """Before and after, without a target."""
    gain = (after.reward_mean - before.reward_mean) / max(before.reward_std, 1e-12)
    kept = after.diversity / max(before.diversity, 1e-12)
    lines = [
        f"reward      {before.reward_mean:8.3f} -> {after.reward_mean:8.3f}  "
        f"({gain:+.2f} standard deviations of the base model's rewards)",
        f"diversity   {before.diversity:8.3f} -> {after.diversity:8.3f}  ({kept:.0%} kept)",
    ]
    if before.recognised is not None and after.recognised is not None:
        lines.append(f"recognised  {before.recognised:8.1%} -> {after.recognised:8.1%}")
    if after.transport_cost is not None:
        lines.append(f"transport cost {after.transport_cost:.3f}: the paths have no noise, no KL")
    return lines


def target_lines(before: Measurement, after: Measurement, beside: Reached) -> list[str]:
    """Before and after beside the target, which must be known."""
    least = (
        "" if beside.least_kl is None else f"best possible for that reward {beside.least_kl:.2f}; "
    )
    reward = (
        f"reward      {before.reward_mean:8.3f} -> {after.reward_mean:8.3f}  "
        f"(target {beside.target_reward:.3f})"
    )
    name = most_raised(beside.shares)
    if name is not None:
        reward = f"{reward:<{BESIDE}} {shares_in_words(name, beside.shares[name])}"
    diversity = f"diversity   {before.diversity:8.3f} -> {after.diversity:8.3f}"
    if beside.target_diversity is not None:
        diversity += f"  (target {beside.target_diversity:.3f})"
    if before.recognised is not None and after.recognised is not None:
        diversity = (
            f"{diversity:<{BESIDE}} recognised {before.recognised:.0%} -> {after.recognised:.0%}"
        )
        if beside.target_recognised is not None:
            diversity += f"  (target {beside.target_recognised:.0%})"
    path_kl = f"path KL     {after.path_kl:8.3f} nats  ({least}target {beside.target_kl:.2f})"
    return [reward, path_kl, diversity, *reached_in_words(beside)]


def most_raised(shares: dict[str, LabelShares]) -> str | None:
    """The "kind: label" whose share the target raises most; None where nobody tells labels."""
    raised = {
        name: share.target - share.before
        for name, share in shares.items()
        if share.target is not None
    }
    return max(raised, key=lambda name: raised[name], default=None)


def shares_in_words(name: str, share: LabelShares) -> str:
    """A label's share before and after, and in the target, which must be known. A style is called
    by its name alone: it is an adjective."""
    kind, label = name.split(": ", 1)
    name = label if kind == "style" else f"{label} {kind}"
    return f"{name} {share.before:.0%} -> {share.after:.0%}  (target {share.target:.0%})"


def reached_in_words(beside: Reached) -> list[str]:
    """One line, or none where the target has hardly more reward than the pretrained model. An
    efficiency that so few samples put outside of 0..1 is left out."""
    if beside.gain_reached is None:
        return []
    if beside.gain_reached < 0:
        return [f"moved away from the target, by {-beside.gain_reached:.0%} of its gain"]
    said = f"reached {beside.gain_reached:.0%} of the target's gain"
    if beside.efficiency is not None and 0 <= beside.efficiency <= 1:
        said += f", with {beside.efficiency:.1%} efficiency"
    return [said]
