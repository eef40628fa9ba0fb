"""Run every method on every exact world by the command line, and write docs/proofs.md from it.

    python tools/proofs.py --out runs/proofs            # an hour on two cores

Each run is `nablagfn train --config=worlds/NAME` with options; finished runs are kept, so that an
interrupted proof goes on where it stopped. Everything in docs/proofs.md comes from their files.
proof.json in a run's folder says that it ended, how, and how many CPU seconds it took.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run per core; two threads each would crawl

from proofs_report import write  # threads are set before anything loads torch
from proofs_run import RECORD, Run
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from nablagfn.runs.runfolder import RunFolder

SEEDS = (0, 1, 2)
COMPARED = 100  # updates of the comparison
FULL = 1000  # updates of the claim
SAME_COST = 445  # updates of Adjoint Matching for the model evaluations of the claim
WORLDS = ("ring", "ring-quadratic", "gaussian", "mixture-16d", "prompts")
OURS, ADJOINT = "∇-DB(λ)", "Adjoint Matching"
PUBLISHED = {"experiment.method": "nabla-db", "model.reward_adaptive_mode": "squared"}
METHODS: dict[str, dict[str, object]] = {
    OURS: {},
    ADJOINT: {"experiment.method": "adjoint-matching"},
    "residual ∇-DB (paper)": PUBLISHED,
    "no_flow (paper)": {**PUBLISHED, "model.no_flow": True},
    "terminal gradient": {"experiment.method": "terminal-gradient"},
    "DAG-DB": {"experiment.method": "dag-db"},
    "DDPO": {"experiment.method": "ddpo"},
    "ReFL": {"experiment.method": "refl"},
    "DRaFT-10": {"experiment.method": "draft-k"},
    "DRaFT-LV": {"experiment.method": "draft-lv"},
    "AlignProp": {"experiment.method": "alignprop"},
}
DIVERGED = "is not finite"  # an outcome: without a prior, a linear reward has no maximum
CLAIMED = {OURS: FULL, ADJOINT: SAME_COST}
SCATTERED: dict[str, object] = {"method.window": 0, "method.return_lambda": 0.0}
STUDY: dict[str, dict[str, object]] = {
    "the setting of the claim: window of 6, λ = 0.9": {},
    "window, λ = 0": {"method.return_lambda": 0.0},
    "window, λ = 1": {"method.return_lambda": 1.0},
    "no window, λ = 0 (one-step bootstrap)": SCATTERED,
    "no window, λ = 0.9 (whole trajectories)": {"method.window": 0},
    "no window, λ = 1 (Adjoint Matching)": {"method.window": 0, "method.return_lambda": 1.0},
    "γ = ᾱ (squared)": {"model.reward_adaptive_mode": "squared"},
    "γ = √ᾱ (sqrt)": {"model.reward_adaptive_mode": "sqrt"},
    "w_k = 1": {"method.step_weight": "one"},
    "guess of the finetuned model": {"method.guess_model": "finetuned"},
    "g_φ without x̂": {"method.flow_hint": False},
    "no g_φ (guess alone)": {"model.no_flow": True},
    "lr of g_φ × 0.5": {"training.flow_lr": 1e-3},
    "lr of g_φ × 2": {"training.flow_lr": 4e-3},
    "both lr × 0.5": {"training.lr": 1e-3, "training.flow_lr": 1e-3},
    "both lr × 2": {"training.lr": 4e-3, "training.flow_lr": 4e-3},
    "constant lr": {"training.lr_schedule": "constant"},
}
STUDIED = "prompts"


def runs(worlds: Sequence[str]) -> list[Run]:
    """Every run of the three tables: our claim first, then seed by seed, so that a proof that was
    interrupted has whole tables of fewer seeds.
    """
    found = []
    for world in worlds:
        for seed in SEEDS:
            for label, options in METHODS.items():
                pairs = tuple(options.items())
                found.append(Run("compared", world, label, seed, COMPARED, pairs))
                if label in CLAIMED:
                    found.append(Run("claim", world, label, seed, CLAIMED[label], pairs))
    if STUDIED in worlds:
        for label, options in STUDY.items():
            pairs = tuple(options.items())
            found += [Run("study", STUDIED, label, seed, COMPARED, pairs) for seed in SEEDS]
    ours = ("claim", OURS)
    return sorted(found, key=lambda run: ((run.table, run.label) != ours, run.seed, run.table))


class Job(Protocol):
    """A training of a proof."""

    def folder(self, out: Path) -> RunFolder: ...

    def done(self, out: Path) -> bool: ...

    def arguments(self, out: Path) -> list[str]: ...


def carry_out(job: tuple[Job, Path]) -> str:
    """One run through the command line of this very process; '' or what went wrong.

    Its CPU seconds are this process's since the last start of the run, imports included.
    """
    started = time.process_time()
    import torch

    from nablagfn.cli import main

    torch.set_num_threads(1)
    run, out = job
    folder = run.folder(out)
    if run.done(out) or (folder.read_json(RECORD) or {}).get("diverged"):
        return ""
    said, diverged = io.StringIO(), False
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(run.arguments(out))
    except SystemExit:
        lines = said.getvalue().strip().splitlines()
        reason = lines[-1] if lines else "ended"
        diverged = DIVERGED in reason
        if not diverged:
            return f"{run}: {reason}"
    seconds = round(time.process_time() - started, 2)
    folder.write_json(RECORD, {"diverged": diverged, "cpu_seconds": seconds})
    return ""


def carry_out_all(wanted: Sequence[Job], out: Path, processes: int) -> list[str]:
    """All runs, several at a time, with a progress bar; what went wrong."""
    failures = []
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as bar, context.Pool(processes) as pool:
        task = bar.add_task("runs", total=len(wanted))
        for failure in pool.imap_unordered(carry_out, [(run, out) for run in wanted]):
            bar.advance(task)
            if failure:
                failures.append(failure)
                bar.console.print(failure)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/proofs"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--worlds", nargs="+", default=WORLDS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only-write", action="store_true", help="from the runs that are there")
    arguments = parser.parse_args()
    wanted = runs(arguments.worlds)
    failures = []
    if not arguments.only_write:
        failures = carry_out_all(wanted, arguments.out, arguments.processes)
    print(f"wrote {write(wanted, arguments.out, arguments.docs)}")
    if failures:
        raise SystemExit(f"{len(failures)} of {len(wanted)} runs ended early")


if __name__ == "__main__":
    main()
