"""Did the numbers move? Two revisions make the same short runs; weights and metrics are compared.

    python tools/compare_revisions.py BASE                 # against the working tree
    python tools/compare_revisions.py BASE REVISION
    python tools/compare_revisions.py BASE --only ring demo --bound 1e-4

Each revision is checked out beside this one and asked through its command line only, on one thread:
six updates of the demo, two of each method on a small pipeline with random weights, with each
sampler and kind of prediction, twenty in a world, and two of the original commands on tiny-animals.
Equal means bit for bit: every checkpointed tensor, and every number of metrics.jsonl,
diagnostics.jsonl and evaluation.json but the seconds.
Otherwise the largest difference is printed, of weights relative to the largest entry of their
tensor, and the exit status is 1 if the first update's losses and gradient norms differ by more than
--bound (default 0). Later numbers may not be bounded so: Adam's first steps have the size of the
learning rate whatever the gradient, so an entry whose gradient is rounding moves by chance.

--old-rounding takes a Python file that the second revision runs first. tools/old_rounding.py puts
the arithmetic of before the kernel formula back, to show that nothing else has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = (
    "nabla-db",
    "nabla-db-lambda",
    "adjoint-matching",
    "terminal-gradient",
    "refl",
    "draft-k",
    "draft-lv",
    "alignprop",
    "ddpo",
    "dag-db",
)
QUIET = {"logging.tensorboard": False, "logging.sample_freq": 0}
SMALL = {
    **QUIET,
    "experiment.reward_fn": "brightness",
    "experiment.prompt_fn": "PROMPTS",
    "model.flow_channel_width": "8,16",
    "sampling.num_steps": 5,
    "sampling.batch_size": 2,
    "sampling.num_batches_per_epoch": 2,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.num_epochs": 1,
    "evaluation.num_prompts": 2,
    "evaluation.images_per_prompt": 2,
}
ORIGINAL = {  # the README's commands, by what each changes
    "default": {},
    "fast": {"model.timestep_fraction": 0.1, "training.gradient_accumulation_steps": 1},
    "no flow": {"model.timestep_fraction": 0.1, "model.no_flow": True},
}
SHORT = {  # what they have in common, on the shipped model, cut to two updates
    "pretrained.model": "tiny-animals",
    "experiment.reward_fn": "tiny-aesthetic",
    "model.reward_scale": 1e4,
    "model.unet_reg_scale": 2e3,
    "sampling.low_var_subsampling": True,
    "sampling.batch_size": 4,
    "sampling.num_batches_per_epoch": 1,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.num_epochs": 2,
    "evaluation.num_prompts": 2,
    "evaluation.images_per_prompt": 2,
}
FIRST = ("metrics.jsonl:0.loss", "metrics.jsonl:0.grad_norm")
SECONDS = ("seconds",)  # what may differ between two equal runs


@dataclass(frozen=True)
class Case:
    """One run: a config and what is set on it. pipeline: the kind of prediction of a random one."""

    name: str
    config: str
    options: dict[str, Any]
    pipeline: str = ""


def cases() -> list[Case]:
    demo = {
        "training.num_epochs": 6,
        "evaluation.num_prompts": 3,
        "evaluation.images_per_prompt": 2,
    }
    found = [Case(method, "config/aesthetic.py", _small(method), "epsilon") for method in METHODS]
    for kind in ("v_prediction", "sample"):
        found.append(Case(f"nabla-db {kind}", "config/aesthetic.py", _small("nabla-db"), kind))
    for scheduler, eta in (("dpm-solver", 1), ("ddim", 0.5)):
        options = {**_small("nabla-db-lambda"), "sampling.scheduler": scheduler}
        options["sampling.eta"] = eta
        found.append(
            Case(f"nabla-db-lambda {scheduler}", "config/aesthetic.py", options, "epsilon")
        )
    ring = {**QUIET, "training.num_epochs": 20, "evaluation.num_prompts": 0}
    found.append(Case("ring", "worlds/ring", ring))
    found.append(Case("demo", "demo", {**QUIET, **demo, "evaluation.images_per_prompt": 2}))
    for name, own in ORIGINAL.items():
        found.append(Case(f"original {name}", "config/aesthetic.py", {**QUIET, **SHORT, **own}))
    return found


def _small(method: str) -> dict[str, Any]:
    return {**SMALL, "experiment.method": method}


# ---------------------------------------------------------------------- one revision


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with that revision; the working tree itself for an empty name."""
    if not revision:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "-q", str(place), revision], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def runs(revision: str, inputs: Path, out: Path, names: Sequence[str], first: str = "") -> None:
    """Make the runs of these cases with that revision, in one process; the folders lie in `out`."""
    with checked_out(revision) as tree:
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--inputs", str(inputs), "--out", str(out)]
        command += ["--old-rounding", first, "--only", *names]
        subprocess.run(command, env=environment, check=True, cwd=tree)


def make_runs(inputs: Path, out: Path, names: Sequence[str], first: str) -> None:
    """What `runs` starts: the command line of the nablagfn that is imported here."""
    import torch

    from nablagfn.cli import main

    torch.set_num_threads(1)
    if first:
        runpy.run_path(first)
    for case in chosen(names):
        options = {**case.options, "saving.output_dir": str(out / folder_of(case))}
        if case.pipeline:
            options["pretrained.model"] = str(inputs / case.pipeline)
            options["experiment.prompt_fn"] = str(inputs / "prompts.txt")
        arguments = [f"--config.{key}={value}" for key, value in options.items()]
        main(["train", f"--config={case.config}", *arguments])


def write_inputs(folder: Path) -> None:
    """Random pipelines of each kind of prediction, and prompts."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny_pipeline import save_pipeline

    for kind in ("epsilon", "v_prediction", "sample"):
        save_pipeline(folder / kind, kind)
    (folder / "prompts.txt").write_text("a cat\na dog\na fox\nan owl\n", encoding="utf-8")


def chosen(names: Sequence[str]) -> list[Case]:
    """Raises SystemExit for a name that no case has."""
    known = {case.name: case for case in cases()}
    for name in names:
        if name not in known:
            raise SystemExit(f"no case '{name}': they are {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def folder_of(case: Case) -> str:
    return case.name.replace(" ", "_")


# ---------------------------------------------------------------------- comparing


def numbers(folder: Path) -> dict[str, Any]:
    """Every tensor of the checkpoints and every number of the records, by name."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted((folder / "checkpoints").rglob("*.safetensors")):
        for name, value in load_file(file).items():
            found[f"{file.relative_to(folder)}:{name}"] = value
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            found |= flat(json.loads(line), f"{name}:{number}")
    evaluation = folder / "evaluation.json"
    if evaluation.is_file():
        found |= flat(json.loads(evaluation.read_text(encoding="utf-8")), "evaluation.json")
    return found


def flat(value: Any, prefix: str) -> dict[str, Any]:
    """Nested records as one level of dotted names."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = ((str(i), item) for i, item in enumerate(value))
    else:
        return {prefix: value}
    return {
        key: item
        for name, part in parts
        if name not in SECONDS
        for key, item in flat(part, f"{prefix}.{name}").items()
    }


def difference(one: Any, two: Any) -> float:
    """0 for bit-equal; tensors relative to their largest entry, numbers to themselves."""
    import torch

    if isinstance(one, torch.Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return math.inf
        if torch.equal(one, two):
            return 0.0
        size = max(float(one.double().abs().max()), 1e-30)
        return float((one.double() - two.double()).abs().max()) / size
    if one == two or (one != one and two != two):
        return 0.0
    if isinstance(one, (int, float)) and isinstance(two, (int, float)):
        return abs(one - two) / max(abs(one), abs(two), 1e-30)
    return math.inf


@dataclass(frozen=True)
class Found:
    """How two runs differ: weights, figures, and the first update's losses and norms, before any
    step of the optimizer has amplified a rounding. missing: names that only one of them has.
    """

    compared: int
    weights: float
    figures: float
    first: float
    worst: str
    missing: tuple[str, ...]

    @property
    def largest(self) -> float:
        return max(self.weights, self.figures)


def compare(one: Path, two: Path) -> Found:
    """Two cases' output folders, each with its one run."""
    first, second = (numbers(next(folder.iterdir())) for folder in (one, two))
    shared = [name for name in first if name in second]
    differences = {name: difference(first[name], second[name]) for name in shared}
    worst = max(differences, key=lambda name: differences[name])

    def largest(weights: bool) -> float:
        return max(
            (d for name, d in differences.items() if (".safetensors:" in name) == weights),
            default=0.0,
        )

    start = [name for name in shared if name.startswith(FIRST)]
    return Found(
        len(shared),
        largest(True),
        largest(False),
        max(differences[name] for name in start),
        worst if differences[worst] else "",
        tuple(sorted(first.keys() ^ second.keys())),
    )


def report(found: dict[str, Found], bound: float) -> int:
    """Print a line per case; the exit status."""
    status = 0
    for name, result in found.items():
        if result.largest == 0:
            said = f"equal, bit for bit ({result.compared} tensors and numbers)"
        else:
            said = (
                f"differ: losses and norms of the first update by {result.first:.1e}, weights by "
                f"{result.weights:.1e}, figures by {result.figures:.1e} (most: {result.worst})"
            )
        if result.missing:
            said += f"; in one only: {', '.join(result.missing[:5])}"
        beyond = result.first > bound if bound else result.largest > 0
        status |= beyond or bool(result.missing)
        print(f"{name:28} {said}")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs="*", help="the base, and another (or the working tree)")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE")
    parser.add_argument(
        "--bound",
        type=float,
        default=0.0,
        help="the largest allowed difference of the first update",
    )
    parser.add_argument("--old-rounding", default="", metavar="FILE")
    parser.add_argument("--keep", type=Path, help="keep the base's runs there, and use them again")
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        make_runs(args.inputs, args.out, args.only, args.old_rounding)
        return 0
    if not 1 <= len(args.revisions) <= 2:
        parser.error("give one revision or two")
    base, other = [*args.revisions, ""][:2]
    names = [case.name for case in chosen(args.only)]
    with tempfile.TemporaryDirectory() as temporary:
        inputs, two = Path(temporary) / "inputs", Path(temporary) / "two"
        one = args.keep or Path(temporary) / "one"
        write_inputs(inputs)
        missing = [case.name for case in chosen(names) if not (one / folder_of(case)).is_dir()]
        if missing:
            runs(base, inputs, one, missing)
        runs(
            other, inputs, two, names, args.old_rounding and str(Path(args.old_rounding).resolve())
        )
        folders = [folder_of(case) for case in chosen(names)]
        found = {name: compare(one / f, two / f) for name, f in zip(names, folders, strict=True)}
    return report(found, args.bound)


if __name__ == "__main__":
    sys.exit(main())
