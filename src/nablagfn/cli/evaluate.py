"""`nablagfn evaluate RUN…`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import command


def add(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        evaluate,
        help="reward, diversity and distance to the base model of every checkpoint, with intervals",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--images-per-prompt",
        type=int,
        default=0,
        help="default: 16; in a world those of evaluation.images_per_prompt",
    )
    parser.add_argument("--prompts", nargs="+", default=[])
    parser.add_argument(
        "--prompt-file",
        default="",
        help=".txt, .json or .csv; default: the run's held-out prompts, else its prompts",
    )
    parser.add_argument(
        "--num-prompts", type=int, default=0, help="so many of them, evenly spread; default: all"
    )
    parser.add_argument(
        "--rewards",
        nargs="*",
        default=None,
        metavar="NAME",
        help="held-out rewards beside the trained one; default: evaluation.held_out_rewards and "
        "text alignment (tiny-alignment, or clipscore where its weights are)",
    )
    parser.add_argument(
        "--checkpoints", nargs="+", default=[], metavar="NAME", help="default: all complete ones"
    )
    parser.add_argument(
        "--resample",
        type=int,
        default=0,
        metavar="K",
        help="measure each checkpoint also with K paths for each sample, of which those are kept "
        "that the target p_pretrained·exp(βr) would have drawn; default: 0, off",
    )
    parser.add_argument("--extractor", default="", help="default: evaluation.extractor")
    parser.add_argument(
        "--weights", default="", help="folder with weights of rewards and extractors"
    )
    parser.add_argument(
        "--batch-size", type=int, default=0, help="samples drawn at once; changes no figure"
    )


def evaluate(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """All runs are checked before the first is measured; a table for each."""
    from ..commands.evaluate import EvaluationRequest, carry_out, make_plan, remarks, tables
    from ..runs.progress import console, note
    from ..runs.runfolder import RunFolder

    request = EvaluationRequest(
        prompts=tuple(arguments.prompts),
        prompt_file=arguments.prompt_file,
        num_prompts=arguments.num_prompts,
        images_per_prompt=arguments.images_per_prompt,
        rewards=None if arguments.rewards is None else tuple(arguments.rewards),
        checkpoints=tuple(arguments.checkpoints),
        extractor=arguments.extractor,
        weights=arguments.weights,
        batch_size=arguments.batch_size,
        resample=arguments.resample,
    )
    for plan in [make_plan(RunFolder(run), request) for run in arguments.runs]:
        found = carry_out(plan)
        if os.environ.get("RANK", "0") == "0":
            console.print(*tables(plan.folder.path.name, found))
            for remark in remarks(found):
                note(remark)
