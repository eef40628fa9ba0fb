"""The `nablagfn` command: one file per subcommand, which imports what it needs when it runs.

Each has `add(commands)`, its parser, and a function of (arguments, rest) given to `common.command`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..config import ConfigError
from . import check_reward, diff, doctor, evaluate, export, plan, report, sample, target, train
from .common import BAD_INPUT, STOPPED, UNUSABLE, Parser, fail
from .train import resolve_config

__all__ = ["BAD_INPUT", "UNUSABLE", "build_parser", "main", "resolve_config"]

COMMANDS = (
    train,
    target,
    sample,
    evaluate,
    report,
    diff,
    export,
    check_reward,
    plan,
    doctor,
)


def build_parser() -> Parser:
    """All subcommands and their flags; run options are added by `--config.group.option=value`."""
    parser = Parser(
        prog="nablagfn",
        description="Finetune diffusion models with a differentiable reward, keeping diversity.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nablagfn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        module.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; user errors end with one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # optional packages, not errors
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is there
    try:
        known, rest = build_parser().parse_known_args(arguments)
        if rest and not known.takes_options:
            raise ConfigError(f"unknown argument {rest[0]}: see nablagfn {known.command} --help")
        known.function(known, rest)
    except ConfigError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("nablagfn: stopped", file=sys.stderr)
        sys.exit(STOPPED)
