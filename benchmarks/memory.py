"""The memory planner: what it chooses for cards of five sizes, and how far it is off.

    python benchmarks/memory.py cards [--reward aesthetic]     SD1.5, counted, nothing is run
    python benchmarks/memory.py error                          tiny-animals, predicted and true

True is the peak of all that an update's tensors take, counted storage by storage while it runs.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import QUIET, machine, parser, report

from nablagfn.commands import planner
from nablagfn.commands.assemble import build_policy, build_prompts, build_reward
from nablagfn.config import Config, set_option
from nablagfn.recipes.options import load_config
from nablagfn.rewards import modules_of
from nablagfn.runs.runfolder import RunFolder
from nablagfn.runtime.costs import Tracker, tensors_of
from nablagfn.training.trainer import Trainer

CARDS = (12, 16, 24, 48, 80)  # GB


def cards(reward: str) -> list[dict[str, Any]]:
    rows = []
    config = load_config("aesthetic")
    config.experiment.reward_fn = reward
    parts = planner.measure(config, torch.device("cuda"))
    for name, no_flow in (("default", False), ("no_flow", True)):
        config.model.no_flow = no_flow
        fixed = dict(parts.fixed)
        if no_flow:
            fixed["flow network and its optimizer"] = 0
        counted, work = replace(parts, fixed=fixed), planner.work_of(config)
        for memory in CARDS:
            found = planner.choose(config, counted, work, memory * 1e9 - planner.CONTEXT)
            s = found.setting
            rows.append(
                {
                    "card": f"{memory} GB",
                    "settings": name,
                    "micro_batch": s.micro_batch if s else "does not fit",
                    "gradient_checkpointing": s.gradient_checkpointing if s else "",
                    "vae_slice": s.vae_slice if s else "",
                    "sampling.batch_size": s.sampling_batch if s else "",
                    "predicted peak, GB": f"{(found.peak + planner.CONTEXT) / 1e9:.1f}",
                    "TFLOP/update": f"{found.flops / 1e12:.0f}",
                }
            )
    return rows


def true_peak(config: Config, rows: int) -> float:
    """Bytes that one update makes, with `rows` transitions at a time."""
    cpu = torch.device("cpu")
    policy: Any = build_policy(config, cpu)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            policy,
            build_reward(config, cpu),
            build_prompts(config),
            config,
            folder=RunFolder(Path(folder) / "run"),
            show_progress=False,
        )
        drawn = trainer.collector.collect(0)
        (chosen,) = trainer.collector.batches(drawn, 0, 0, trainer.objective)
        modules = [policy.network, policy.vae, *policy.encoders().values()]
        modules += [trainer.objective.modules, *modules_of(trainer.reward)]
        with Tracker([*tensors_of(modules), chosen.paths.x, chosen.paths.output]) as tracker:
            trainer.updater.accumulate(chosen, rows)
    return tracker.peak


def error() -> list[dict[str, Any]]:
    found = []
    saving = {"training.gradient_checkpointing": True, "training.vae_slice": 4}
    for name, options in (
        ("default", {}),
        ("checkpointing, slices of 4", saving),
        ("no_flow", {"model.no_flow": True}),
    ):
        config = load_config("demo")
        for key, value in {**QUIET, "sampling.num_steps": 2, **options}.items():
            set_option(config, key, value)
        parts, work = planner.measure(config, torch.device("cpu")), planner.work_of(config)
        for rows in (4, 16):
            setting = replace(planner.setting_of(config), micro_batch=rows)
            moments = planner.moments(config, parts, work, setting)
            predicted = max(v for k, v in moments.items() if k.startswith("update"))
            predicted += parts.fixed["flow network and its optimizer"] / 4  # its gradients
            true = true_peak(config, rows)
            found.append(
                {
                    "settings": name,
                    "micro_batch": rows,
                    "predicted, MB": f"{predicted / 1e6:.0f}",
                    "true, MB": f"{true / 1e6:.0f}",
                    "predicted / true": f"{predicted / true:.2f}",
                }
            )
    return found


def main() -> None:
    p = parser(__doc__)
    p.add_argument("what", choices=("cards", "error"))
    p.add_argument("--reward", default="aesthetic")
    arguments = p.parse_args()
    rows = cards(arguments.reward) if arguments.what == "cards" else error()
    report({"machine": machine(), "rows": rows}, rows, arguments.out)


if __name__ == "__main__":
    main()
