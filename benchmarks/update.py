"""One full update (drawing included): three settings, and each switch, side by side in one run.

    python benchmarks/update.py                        tiny-animals on a CPU, SD1.5 on a GPU
    python benchmarks/update.py --only default no_flow --repeats 5
    python benchmarks/update.py --against 3a0941a      this revision and that one, in turns
    python benchmarks/update.py --profile              the largest costs by name

Switches are added to one of the settings: default, or on a GPU fast, which is shorter (--base).

SD1.5 and its reward have random weights. Every measurement is a fresh process; variants take turns,
so that a busy machine slows all of them alike. FLOPs are counted by torch's FlopCounterMode; the
share of the matmul rate is FLOPs per second over this machine's best matrix product. On a CPU a
second is one of this process's own work, which other processes do not slow; the clock is beside it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import (
    QUIET,
    ROOT,
    child,
    device,
    machine,
    parser,
    report,
    revision,
    summary,
)

from nablagfn.commands.planner import matmul_rate

Options = dict[str, Any]
CLOCK = "seconds" if torch.cuda.is_available() else "processor seconds"

SWITCHES: dict[str, Options] = {
    "micro_batch=8": {"training.micro_batch": 8},
    "micro_batch=20": {"training.micro_batch": 20},
    "gradient_checkpointing": {"training.gradient_checkpointing": True},
    "vae_slice=4": {"training.vae_slice": 4},
    "vae_checkpointing": {"training.vae_checkpointing": True},
    "compile": {"speed.compile": True},
    "compile_reward": {"speed.compile_reward": True},
    "cuda_graphs": {"speed.cuda_graphs": True},
    "channels_last": {"speed.channels_last": True},
    "channels_last and compile": {"speed.channels_last": True, "speed.compile": True},
    "fused_optimizer": {"speed.fused_optimizer": True},
    "adamw8bit": {"training.optimizer": "adamw8bit"},
    "offload_text_encoder": {"speed.offload_text_encoder": True},
    "offload_reward": {"speed.offload_reward": True},
}
NEW = ("speed.", "training.vae_")  # groups of options that an older revision need not have


def sizes(batch: int, batches: int) -> Options:
    """One update an epoch, on `batches` batches of `batch` paths."""
    return {
        "sampling.batch_size": batch,
        "sampling.num_batches_per_epoch": batches,
        "training.batch_size": batch,
        "training.gradient_accumulation_steps": batches,
    }


SETTINGS: dict[str, dict[str, Options]] = {
    "sd15": {  # paths of an update as in the commands of the README
        "default": {**sizes(4, 8), "sampling.batch_size": 16, "sampling.num_batches_per_epoch": 2},
        "fast": sizes(4, 1),
        "no_flow": {**sizes(4, 4), "model.no_flow": True},
    },
    "tiny-animals": {  # of `make demo`; fast: a quarter of its paths
        "default": {},
        "fast": sizes(4, 1),
        "no_flow": {"model.no_flow": True},
    },
}


def variants(model: str, base: str) -> dict[str, Options]:
    """The settings of `model`, and `base` with each switch."""
    found = dict(SETTINGS[model])
    return found | {f"{base}, {name}": {**found[base], **o} for name, o in SWITCHES.items()}


def settings(model: str, folder: Path) -> tuple[str, Options]:
    """A config's name and the options that put `model` in it. SD1.5 is written to `folder`."""
    if model != "sd15":
        return "demo", {**QUIET, "pretrained.model": model}
    from nablagfn.commands.architectures import aesthetic
    from nablagfn.models.architectures import random_sd15

    random_sd15().save_pretrained(folder / "sd15")
    reward = aesthetic()
    reward.clip.save_pretrained(folder / "clip")
    torch.save(reward.head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    options = {"pretrained.model": str(folder / "sd15"), "reward.weights": str(folder)}
    return "aesthetic", {**QUIET, **options, **SETTINGS["sd15"]["fast"]}


def row(name: str, runs: list[dict[str, Any]], flops: float | None, rate: float) -> dict[str, Any]:
    """Medians over the runs' updates."""
    errors = [found["error"] for found in runs if "error" in found]
    if errors:
        return {"variant": name, "s/update": f"failed: {errors[0]}"}
    seconds = [s for found in runs for s in found["seconds"]]
    middle, last = statistics.median(s for found in runs for s in found[CLOCK]), runs[-1]
    return {
        "variant": name,
        "s/update": f"{middle:.2f}",
        "on the clock": f"{min(seconds):.2f}-{max(seconds):.2f}",
        "updates/s": f"{1 / middle:.3f}",
        "trajectories/s": f"{last['paths'] / middle:.2f}",
        "peak, GB": f"{statistics.median(found['peak'] for found in runs) / 1e9:.2f}",
        "evaluations": f"{last['model_evals']:.0f}",
        "decodes": f"{last['decode_evals']:.0f}",
        "GFLOP": f"{flops / 1e9:.0f}" if flops else "",
        "of matmul rate": f"{flops / middle / rate:.0%}" if flops else "",
    }


def compare(arguments: Any, config: str, base: Options) -> None:
    """The variants in turns; with --against, each of them in both revisions, the other one without
    the switches that it does not know.
    """
    known = variants(arguments.model, arguments.base)
    slow = ("compile", "cuda_graphs")  # compiling takes minutes on a CPU
    usual = [n for n in known if torch.cuda.is_available() or not any(word in n for word in slow)]
    names = arguments.only or usual
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise SystemExit(f"--only: there is no {unknown!r}; there are: {'; '.join(known)}")
    with ExitStack() as stack:
        sources = {"": ROOT / "src"}
        if arguments.against:
            sources[f" @ {arguments.against}"] = stack.enter_context(revision(arguments.against))
        jobs = {
            name + label: ({"config": config, "options": {**base, **chosen}}, source)
            for name in names
            for label, source in sources.items()
            for chosen in [without(NEW, known[name]) if label else known[name]]
        }
        runs = defaultdict[str, list[dict[str, Any]]](list)
        for _ in range(arguments.repeats):
            for name, (job, source) in jobs.items():
                timed = {**job, "updates": 1 + arguments.updates, "mode": "time"}
                runs[name].append(child(timed, source))
        flops = {}
        if not arguments.against:  # counting is slow, and the other revision may do other work
            for name, (job, source) in jobs.items():
                eager = without(("speed.compile", "speed.cuda_graphs"), job["options"])
                counted = {**job, "options": eager, "updates": 1, "mode": "flops"}
                found = child(counted, source)
                flops[name] = found.get("flops")
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    rate = matmul_rate(device(), dtype)
    rows = [row(name, runs[name], flops.get(name), rate) for name in jobs]
    result = {"machine": machine(), "matmul FLOP/s": rate, "flops": flops, "runs": runs}
    if arguments.against:
        result["ratios"] = ratios(names, f" @ {arguments.against}", runs)
        print(result["ratios"])
    report(result, rows, arguments.out)


def without(groups: tuple[str, ...], options: Options) -> Options:
    return {key: value for key, value in options.items() if not key.startswith(groups)}


def ratios(names: list[str], label: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each turn: updates/s of this revision over the other's, and peak memory."""
    found = {}
    for name in names:
        pairs = list(zip(runs[name], runs[name + label], strict=True))
        if any("error" in run for pair in pairs for run in pair):
            continue
        speed = [statistics.median(b[CLOCK]) / statistics.median(a[CLOCK]) for a, b in pairs]
        peak = [a["peak"] / b["peak"] for a, b in pairs]
        loss = [a["loss"] / b["loss"] for a, b in pairs]
        found[name] = {
            "updates/s": summary(speed),
            "peak": summary(peak),
            "first loss": summary(loss),
        }
    return found


def show_profile(arguments: Any, config: str, base: Options) -> None:
    """The five largest of the phases and of the operators, with the settings of --base."""
    options = {**base, **SETTINGS[arguments.model][arguments.base]}
    job = {"config": config, "options": options, "updates": arguments.updates, "mode": "profile"}
    found = child(job)
    if "error" in found:
        raise SystemExit(found["error"])
    total, rows = sum(found["phases"].values()), []
    for kind in ("phases", "operators"):
        for name, seconds in list(found[kind].items())[:5]:
            share = f"{seconds / total:.0%}" if kind == "phases" else ""
            rows.append(
                {"kind": kind, "name": name, "s": f"{seconds:.2f}", "share of the time": share}
            )
    report({"machine": machine(), **found}, rows, arguments.out)


def main() -> None:
    p = parser(__doc__)
    usual = "sd15" if torch.cuda.is_available() else "tiny-animals"
    p.add_argument("--model", default=usual, choices=list(SETTINGS))
    p.add_argument("--base", default="fast" if usual == "sd15" else "default")
    p.add_argument("--only", nargs="+", default=[], help="variants by name, as the table has them")
    p.add_argument("--updates", type=int, default=3, help="timed in each process")
    p.add_argument("--repeats", type=int, default=3, help="processes per variant")
    p.add_argument("--against", default="", help="a git revision to measure in turns with this one")
    p.add_argument("--profile", action="store_true")
    arguments = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config, base = settings(arguments.model, Path(folder))
        (show_profile if arguments.profile else compare)(arguments, config, base)


if __name__ == "__main__":
    main()
