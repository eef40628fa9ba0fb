"""What all subcommands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..config import ConfigError, describe
from ..recipes.options import packaged

BAD_INPUT = 2
UNUSABLE = 1
STOPPED = 130  # as shells have it for Ctrl-C

Function = Callable[[argparse.Namespace, Sequence[str]], None]


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def command(
    commands: Any, name: str, function: Function, *, help: str, options: bool = False
) -> argparse.ArgumentParser:
    """The parser of subcommand `name`, which calls function(arguments, rest).

    options: takes run options (`--config`, and `--config.group.option=value` in `rest`).
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=_options_help() if options else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if options:
        parser.add_argument("--config", default="", help=f"a .py file, or one of {packaged()}")
    parser.set_defaults(function=function, takes_options=options)
    return parser


def _options_help() -> str:
    """Every run option with its default, from the fields' own descriptions."""
    lines = ["options of a run (--config.NAME=VALUE):"]
    for name, (text, default) in describe().items():
        lines.append(f"  {name} = {default!r}\n      {text}")
    return "\n".join(lines).replace("%", "%%")


def fail(message: str, *, alone: bool = False) -> NoReturn:
    """One line from the first process of each machine, then exit code 2.

    alone: what the other processes do not know is said by whichever it happened to.
    """
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"nablagfn: error: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)
