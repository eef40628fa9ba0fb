"""What a cheaper reward guess costs in accuracy: method.guess in two worlds, three seeds.

    python tools/guess_kinds.py --out runs/guess-kinds     # half an hour on one core

Each run is `nablagfn train --config=worlds/NAME` at 20 steps; its last weights are judged by 4,000
samples against the world's own target. Writes the table in docs/methods.md from the runs that are
there, and docs/guess_kinds.json. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run per core

import torch
from pages import insert_between
from proofs import carry_out_all
from proofs_run import RECORD, folder_of, reached, safe_name, train_arguments

from nablagfn.commands.assemble import build_policy
from nablagfn.evaluation import draw_paths
from nablagfn.methods.build import build_kernel
from nablagfn.runs.runfolder import RunFolder, checkpoint_name
from nablagfn.training.checkpoint import load_policy
from nablagfn.worlds import load
from nablagfn.worlds.measure import distances, floors
from nablagfn.worlds.target import Target

STEPS, UPDATES, SEEDS = 20, 100, (0, 1, 2)
ROWS, SEED = 4_000, 66_000  # of the draws that are judged
WORLDS = ("ring-flow", "gaussian")
KINDS = ("gradient", "no-jacobian")
SHARED: dict[str, object] = {  # as in tests/test_proofs.py
    "training.lr": 5e-3,
    "training.flow_lr": 5e-3,
    "model.timestep_fraction": 5 / STEPS,
    "sampling.num_steps": STEPS,
    "evaluation.num_prompts": 0,
    "logging.sample_freq": 0,
    "logging.save_freq": UPDATES,
    "training.num_epochs": UPDATES,
}
ONE_STEP = {"method.window": 0, "method.return_lambda": 0.0}
METHODS: dict[str, dict[str, object]] = {
    "`nabla-db`": {"experiment.method": "nabla-db"},
    "`nabla-db`, `no_flow`": {"experiment.method": "nabla-db", "model.no_flow": True},
    "`nabla-db-lambda`, window of 6, λ = 0.9": {},
    "`nabla-db-lambda`, λ = 0": ONE_STEP,
    "`nabla-db-lambda`, λ = 0, `no_flow`": {**ONE_STEP, "model.no_flow": True},
}
START, END = "<!-- guess-kinds: written by tools/guess_kinds.py -->", "<!-- guess-kinds -->"


@dataclass(frozen=True)
class Run:
    """One training: `carry_out_all`'s job."""

    world: str
    method: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        return safe_name(self.method, self.kind)

    def folder(self, out: Path) -> RunFolder:
        return folder_of(out, self.world, self.name, self.seed)

    def done(self, out: Path) -> bool:
        return reached(self.folder(out), UPDATES)

    def arguments(self, out: Path) -> list[str]:
        options = {**SHARED, **METHODS[self.method], "method.guess": self.kind}
        options["saving.output_dir"] = out
        return train_arguments(self.world, self.name, self.seed, options)


@dataclass(frozen=True)
class Found:
    """MMD² over its floor, the KL of the mode masses (of the Gaussians) in nats, and how far E[r]
    came from the pretrained model's (0) to the target's (1)."""

    mmd: float
    kl: float
    way: float


def measured(run: Run, out: Path) -> Found:
    folder = run.folder(out)
    config, world = folder.config(), load(run.world)
    policy = build_policy(config, torch.device("cpu"))
    load_policy(policy, folder.checkpoints / checkpoint_name(UPDATES))
    table, prompt = build_kernel(config, policy), world.prompts[0]
    target = Target.of(world, table, prompt)
    x = draw_paths(policy, table, [prompt] * ROWS, range(ROWS), seed=SEED).clean
    figures, least = distances(target, x), floors(target, ROWS)
    start = float(target.rewards.mean())
    reward = float(world.reward(x.double(), torch.zeros(ROWS, dtype=torch.long)).mean())
    return Found(
        mmd=figures["mmd2"] / least["mmd2"],
        kl=figures.get("mode_kl", figures.get("gaussian_kl", float("nan"))),
        way=(reward - start) / (target.reward - start),
    )


def cell(found: Sequence[Found], diverged: int) -> str:
    """Least to most of the seeds."""
    lost = f"{diverged} of {diverged + len(found)} left the range of numbers" if diverged else ""
    if not found:
        return lost or "not run"
    shown = (
        several([one.mmd for one in found], ".0f" if found[0].mmd > 20 else ".1f"),
        several([one.kl for one in found], ".2f" if found[0].kl > 1 else ".3f"),
        several([100 * one.way for one in found], ".0f") + " %",
    )
    return " · ".join((*shown, lost) if lost else shown)


def several(values: Sequence[float], digits: str) -> str:
    """The least and the most."""
    least, most = f"{min(values):{digits}}", f"{max(values):{digits}}"
    return least if least == most else f"{least} to {most}"


def table(runs: Sequence[Run], found: dict[Run, Found], out: Path) -> str:
    """The markdown between the two marks."""
    lines = [START, "", f"| method | `method.guess` | {' | '.join(WORLDS)} |"]
    lines.append("|---|---|" + "---|" * len(WORLDS))
    for method in METHODS:
        for kind in KINDS:
            cells = []
            for world in WORLDS:
                same = [r for r in runs if (r.method, r.kind, r.world) == (method, kind, world)]
                records = [run.folder(out).read_json(RECORD) or {} for run in same]
                lost = sum(bool(record.get("diverged")) for record in records)
                cells.append(cell([found[run] for run in same if run in found], lost))
            lines.append(f"| {method} | `{kind}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/guess-kinds"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only-write", action="store_true", help="from the runs that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, docs = arguments.out, arguments.docs
    runs = [
        Run(world, method, kind, seed)
        for seed in SEEDS
        for world in WORLDS
        for method in METHODS
        for kind in KINDS
    ]
    failures = [] if arguments.only_write else carry_out_all(runs, out, arguments.processes)
    found = {run: measured(run, out) for run in runs if run.done(out)}
    known = [{**asdict(run), **asdict(one)} for run, one in found.items()]
    text = json.dumps(known, indent=1, ensure_ascii=False)
    (docs / "guess_kinds.json").write_text(text + "\n", encoding="utf-8")
    insert_between(docs / "methods.md", START, table(runs, found, out), END)
    if failures:
        raise SystemExit(f"{len(failures)} of {len(runs)} runs ended early")


if __name__ == "__main__":
    main()
