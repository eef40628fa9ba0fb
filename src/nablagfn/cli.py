"""The `nablagfn` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__
from .config import Config, ConfigError, describe, set_option
from .options import apply_overrides, load_config, packaged

if TYPE_CHECKING:
    from .runfolder import RunFolder
    from .trainer import RunResult

BAD_INPUT = 2
UNUSABLE = 1


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their flags; run options are added by `--config.group.option=value`."""
    parser = Parser(
        prog="nablagfn",
        description="Finetune diffusion models with a differentiable reward, keeping diversity.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nablagfn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="finetune a model (continues the same run when started again)",
        epilog=_options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("--config", default="", help=f"a .py file, or one of {packaged()}")
    train.add_argument("--seed", type=int, default=None, help="seed of the run (default 0)")
    train.add_argument("--exp_name", default="", help="name of the experiment, for the run folder")
    train.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: continue the run if its folder exists; never: a new folder; must: or fail",
    )

    sample = commands.add_parser("sample", help="draw base and finetuned pictures side by side")
    sample.add_argument("run", type=Path, help="a run folder")
    sample.add_argument("--prompts", nargs="+", default=[], help="default: some of the run's")
    sample.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    sample.add_argument("--checkpoint", default="", help="a folder name in RUN/checkpoints")
    sample.add_argument("--out", type=Path, default=None, help="default: RUN/samples/….png")

    check = commands.add_parser(
        "check-reward",
        help="is a reward fit for training? a table; exit code 1 when not",
        epilog=_options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument("reward", nargs="?", default="", help="default: experiment.reward_fn")
    check.add_argument("--config", default="", help=f"a .py file, or one of {packaged()}")
    check.add_argument(
        "--samples", type=int, default=8, help="pictures of the base model to try it on; 0: none"
    )

    report = commands.add_parser("report", help="write RUN/report.html anew")
    report.add_argument("run", type=Path, help="a run folder")
    return parser


def _options_help() -> str:
    """Every run option with its default, from the fields' own descriptions."""
    lines = ["options of a run (--config.NAME=VALUE):"]
    for name, (text, default) in describe().items():
        lines.append(f"  {name} = {default!r}\n      {text}")
    return "\n".join(lines).replace("%", "%%")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; user errors end with one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # optional packages, not errors
    try:
        known, rest = build_parser().parse_known_args(arguments)
        if known.command == "train":
            train(known, rest)
        elif known.command == "check-reward":
            check_reward(known, rest)
        elif rest:
            raise ConfigError(f"unknown argument {rest[0]}: see nablagfn {known.command} --help")
        elif known.command == "sample":
            sample(known)
        else:
            write_report(known.run)
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> None:
    """One line from the first process of each machine, then exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"nablagfn: error: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def resolve_config(arguments: argparse.Namespace, rest: Sequence[str]) -> Config:
    """Config file, then overrides, then --seed."""
    config = load_config(arguments.config) if arguments.config else Config()
    apply_overrides(config, rest)
    if arguments.seed is not None:
        set_option(config, "seed", arguments.seed)
    config.check()
    return config


def choose_folder(config: Config, exp_name: str, resume: str) -> RunFolder:
    """Where the run lives, by the --resume policy. Raises ConfigError for `must` without a run."""
    from .runfolder import check_same_settings, fresh_folder, run_folder

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
    from .assemble import build_trainer
    from .trainer import TrainingError

    trainer = build_trainer(config, folder)
    try:
        result = trainer.fit()
    except TrainingError as error:
        fail(str(error))
    if trainer.accelerator.is_main_process:
        summarise(result)


def summarise(result: RunResult) -> None:
    """Before and after in three lines, and where the report is."""
    if not result.finished:
        print(f"stopped after update {result.updates}; the same command continues it")
    before, after = result.before, result.after
    if before and after:
        gain = (after.reward_mean - before.reward_mean) / max(before.reward_std, 1e-12)
        kept = after.diversity / max(before.diversity, 1e-12)
        print(
            f"reward      {before.reward_mean:8.3f} -> {after.reward_mean:8.3f}  "
            f"({gain:+.2f} standard deviations of the base model's rewards)"
        )
        print(f"diversity   {before.diversity:8.3f} -> {after.diversity:8.3f}  ({kept:.0%} kept)")
        if before.recognised is not None and after.recognised is not None:
            print(f"recognised  {before.recognised:8.1%} -> {after.recognised:8.1%}")
        for name, value in after.others.items():
            print(f"{name:<22} {before.others[name]:8.4f} -> {value:8.4f}")
    print(f"report: {result.report}")


def check_reward(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the table; exit code 1 when the reward is unusable. The default model is the shipped
    one."""
    config = load_config(arguments.config) if arguments.config else load_config("demo")
    apply_overrides(config, rest)
    if arguments.reward:
        set_option(config, "experiment.reward_fn", arguments.reward)
    config.check()
    from .check_reward import check

    found = check(config, arguments.samples)
    print(found.table())
    if not found.usable:
        sys.exit(UNUSABLE)


def write_report(run: Path) -> None:
    """RUN/report.html from the run's files."""
    from .report import build
    from .runfolder import RunFolder

    print(f"report: {build(RunFolder(run))}")


def sample(arguments: argparse.Namespace) -> None:
    """Base and finetuned pictures from the same seeds, one row of each per prompt."""
    from .assemble import side_by_side
    from .runfolder import RunFolder

    target = side_by_side(
        RunFolder(arguments.run),
        prompts=arguments.prompts,
        seeds=arguments.seeds,
        checkpoint=arguments.checkpoint,
        out=arguments.out,
    )
    print(f"pictures: {target} (for each prompt: base above, finetuned below)")
