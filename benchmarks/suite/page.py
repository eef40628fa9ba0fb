"""The page docs/gpu/README.md, from rows of results alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common import table

from .rows import Row
from .steps import STEPS

Predictions = Mapping[str, Mapping[str, float]]
Result = tuple[str, Sequence[Row], Predictions]
Cells = Sequence[Mapping[str, Any]]

INTRODUCTION = """# On a GPU

This page is made by `python benchmarks/gpu_report.py` from the results beside it.

## Run the suite

```bash
python benchmarks/gpu_suite.py --list                     # the steps, the most important first
python benchmarks/gpu_suite.py --budget 480 --out out     # on a machine with an NVIDIA GPU
python benchmarks/gpu_suite.py --budget 300 --out more --skip-done out/results.jsonl
python benchmarks/gpu_suite.py --device cpu --small --budget 240 --out rehearsal
python benchmarks/gpu_report.py add out 2026-12-h100      # keep the results, make this page
```

Each step is a process with a time limit of its own. Each case is written to `results.jsonl` when
it is known, so a run that is cut off loses one case; what fails is recorded with its traceback, and
the next begins. A machine without internet: [air_gapped.md](../air_gapped.md). `pytest -m gpu` is
the suite's step `tests` alone.

Stable Diffusion 1.5 and the three original rewards have their true architectures at full width and
random weights: what takes time and memory is as it would be, what the pictures show is not.
"""
NOTHING = """
## Results

**None yet.** No GPU has run the suite. It has been rehearsed on a CPU (`--device cpu --small`),
where tiny-animals stands in for Stable Diffusion. Nothing is claimed of a GPU until a result lies
here.
"""


def page(results: Sequence[Result]) -> str:
    """All results, each a section."""
    parts = [INTRODUCTION]
    if not results:
        parts.append(NOTHING)
    for name, rows, predictions in results:
        parts += section(name, newest(rows), predictions)
    return "\n".join(parts).rstrip() + "\n"


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of each case its last result; what has figures is not replaced by a failure, nor that by the
    case's being left out.
    """
    kept: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.at):
        other = kept.get(row.key)
        if other is None or ORDER.index(row.status) <= ORDER.index(other.status):
            kept[row.key] = row
    return list(kept.values())


def section(name: str, rows: Sequence[Row], predictions: Predictions) -> Iterator[str]:
    """Everything that one card has shown."""
    yield f"\n## {name}\n"
    yield about(rows)
    for title, cells, words in (
        ("What became of each step", outcomes(rows), ""),
        ("Rates", rates(rows), "Square products of 8192 × 8192 random numbers; a copy in memory."),
        ("Tests", tests(rows), "`pytest -m gpu`."),
        ("The demo", demo(rows), "`make demo` with its settings as they are."),
        ("The README's commands", commands(rows), "One update each, by the command line."),
        ("Updates", updates(rows, predictions, WHOLE), MFU),
        ("As the published code does it", published(rows), TURNS),
        ("Switches", updates(rows, predictions, TUNED), SWITCHES),
        ("Reward gradients", gradients(rows), GRADIENTS),
        (
            "The ten largest costs",
            profile(rows),
            "Own time of the device; an update of 4 paths with 10 steps, 24 transitions.",
        ),
        ("What failed", failures(rows), ""),
    ):
        if cells:
            yield f"\n### {title}\n"
            if words:
                yield f"{words}\n"
            yield table(cells)


WHOLE = ("updates", "long-updates")
TUNED = ("switches", "graphs", "compile", "together")
MFU = (
    "One update, warm. TFLOP are the planner's count, and the last column is TFLOP per second over "
    "the card's own bf16 rate above. Predicted: the planner's peak."
)
TURNS = (
    "Seconds of learning once from the same transitions, in turns in one process (a median of the "
    "turns after the first), and the published way's seconds over each: of learning, and of an "
    "update with the drawing, which is the same. One U-Net backward pass per gradient, four "
    "transitions at a time, is the published code's work (docs/performance.md); the code is ours."
)
SWITCHES = "Each beside `micro_batch=8` on eight paths; compiled cases after their first update."
GRADIENTS = (
    "Seconds and gigabytes above the weights, median of three: β∇r(decode(z)) through SD1.5's "
    "decoder and the reward, and the guess β∇_x r(decode(x̂(x))), which passes the U-Net too."
)


UNSAID = ("nablagfn", "platform", "command")  # the commit says more


def about(rows: Sequence[Row]) -> str:
    """Card, date, commit, versions."""
    begun = [row for row in rows if row.step == "suite"]
    card = rows[0].on if rows else ""
    found = figures(rows, "machine", "rates").get("versions", {})
    dates = sorted({row.at[:10] for row in rows})
    said = {name: version for name, version in found.items() if name not in UNSAID}
    versions = ", ".join(f"{name} {version}" for name, version in said.items())
    commits = ", ".join(sorted({str(row.figures.get("commit") or "unknown") for row in begun}))
    small = " A rehearsal with small settings." if any(row.small for row in rows) else ""
    between = " to ".join(dates[:1] + dates[1:][-1:])
    return f"{card}; {between}; commit {commits}; {versions or 'versions unknown'}.{small}"


def figures(rows: Sequence[Row], step: str, case: str) -> Mapping[str, Any]:
    """Of one case; empty when it has none."""
    return next((row.figures for row in rows if row.key == (step, case)), {})


def done(rows: Sequence[Row], step: str) -> list[Row]:
    return [row for row in rows if row.step == step and row.status == "done"]


def outcomes(rows: Sequence[Row]) -> Cells:
    found = []
    for step in STEPS:
        own = [row for row in rows if row.step == step.name]
        counts = {status: sum(row.status == status for row in own) for status in ORDER}
        if own:
            text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
            found.append({"step": step.name, "what": step.why, "cases": text})
    return found


ORDER = ("done", "failed", "timeout", "unavailable", "skipped")  # by what a result is worth


OUTCOMES = ("passed", "failed", "skipped")


def rates(rows: Sequence[Row]) -> Cells:
    found = figures(rows, "machine", "rates")
    if not found:
        return []
    cells = {f"{k}, TFLOP/s": f"{v / 1e12:.3g}" for k, v in found["FLOP/s"].items()}
    return [{**cells, "copy, GB/s": f"{found['copy, bytes/s'] / 1e9:.3g}"}]


def tests(rows: Sequence[Row]) -> Cells:
    own = [row for row in rows if row.step == "tests" and row.figures.get("counts")]
    return [
        {"tests": row.case, **{name: row.figures["counts"].get(name, 0) for name in OUTCOMES}}
        for row in own
    ]


def demo(rows: Sequence[Row]) -> Cells:
    found = figures(rows, "demo", "demo")
    before, after = found.get("before"), found.get("after")
    if not before or not after:
        return []
    return [
        {
            "seconds": f"{found['seconds']:.0f}",
            "reward": f"{before['reward_mean']:.3f} -> {after['reward_mean']:.3f}",
            "diversity": f"{before['diversity']:.3f} -> {after['diversity']:.3f}",
            "recognised": f"{before['recognised']:.1%} -> {after['recognised']:.1%}",
            "path KL, nats": f"{after['path_kl']:.1f}",
            "peak, GB": gigabytes(found["peak"]),
        }
    ]


def commands(rows: Sequence[Row]) -> Cells:
    return [
        {
            "command": row.case,
            "seconds, loading included": f"{row.figures['seconds']:.1f}",
            "of the update, cold": f"{row.figures['update']:.1f}",
            "peak, GB": gigabytes(row.figures["peak"]),
        }
        for row in (*done(rows, "commands"), *done(rows, "long-commands"))
    ]


def updates(rows: Sequence[Row], predictions: Predictions, steps: Sequence[str]) -> Cells:
    """Seconds by part, trajectories/s, peaks measured and predicted, arithmetic."""
    rate = figures(rows, "machine", "rates").get("FLOP/s", {}).get("bf16")
    found = []
    for row in (row for step in steps for row in done(rows, step)):
        f, known = row.figures, predictions.get("/".join(row.key), {})
        peak = max(f["peak_draw"], f["peak_learn"])
        cells = {
            "case": row.case,
            "paths": f["paths"],
            "drawing, s": f"{f['draw']:.2f}",
            "learning, s": f"{f['learn']:.2f}",
            "optimizer, ms": f"{1e3 * f['step']:.1f}",
            "trajectories/s": f"{f['trajectories/s']:.2f}",
            "peak, GB": gigabytes(peak),
            "predicted, GB": gigabytes(known["peak"]) if known else "",
            "TFLOP": f"{known['flops'] / 1e12:.0f}" if known else "",
            "of the bf16 rate": (
                f"{known['flops'] / f['seconds'] / rate:.0%}" if known and rate else ""
            ),
        }
        if "cold" in f:
            cells["case"] += f" (first update {f['cold']['seconds']:.0f} s)"
        found.append(cells)
    return found


def published(rows: Sequence[Row]) -> Cells:
    found = figures(rows, "published", "turns")
    cells = []
    for name, runs in found.get("runs", {}).items():
        learning, update = (
            found[f"{what}, published / ours"].get(name, []) for what in ("learning", "update")
        )
        cells.append(
            {
                "way": name,
                "learning, s": f"{statistics.median(run['seconds'] for run in runs[1:]):.2f}",
                "peak, GB": gigabytes(max(run["peak"] for run in runs)),
                "loss": f"{runs[0]['loss']:.6g}",
                "ratio of learning": spread(learning),
                "ratio of an update": spread(update),
            }
        )
    return cells


def gradients(rows: Sequence[Row]) -> Cells:
    found = []
    for row in done(rows, "gradients"):
        for line in row.figures["rows"]:
            cells = {
                "reward": row.case,
                "pixels": f"{line['pixels']}²",
                "pictures": line["pictures"],
            }
            for name in ("decode", "guess"):
                part = line.get(name)
                cells[f"{name}, s"] = f"{part['seconds']:.3f}" if part else line.get("error", "")
                cells[f"{name}, GB"] = gigabytes(part["peak above"]) if part else ""
            found.append(cells)
    return found


def profile(rows: Sequence[Row]) -> Cells:
    found = figures(rows, "profile", "fast")
    cells = [
        {
            "kernel": f"`{line['name'][:90]}`",
            "calls": line["calls"],
            "ms": f"{1e3 * line['seconds']:.1f}",
            "share": f"{line['seconds'] / found['seconds']:.0%}",
        }
        for line in found.get("largest", [])
    ]
    if cells:
        waiting = found["waiting"]
        cells.append(
            {
                "kernel": "nothing to do",
                "calls": "",
                "ms": f"{1e3 * waiting:.1f}",
                "share": f"{waiting / found['seconds']:.0%}",
            }
        )
    return cells


def failures(rows: Sequence[Row]) -> Cells:
    return [
        {"step": row.step, "case": row.case, "status": row.status, "last line": last_line(row)}
        for row in rows
        if row.status in ("failed", "timeout", "unavailable")
    ]


def last_line(row: Row) -> str:
    lines = [line for line in row.error.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300].replace("|", "\\|") if lines else ""


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
