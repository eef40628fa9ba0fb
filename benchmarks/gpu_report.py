"""docs/gpu: results of benchmarks/gpu_suite.py, and the page that is made of them.

    python benchmarks/gpu_report.py add DIR NAME      keep a run's results as docs/gpu/NAME
    python benchmarks/gpu_report.py                   make docs/gpu/README.md anew
    python benchmarks/gpu_report.py --check           exit code 1 when it is not up to date

`add` may be repeated: later rows of a case replace earlier ones. It also predicts each measured
peak and counts each update's arithmetic, on the meta device (minutes on a CPU; nothing of it needs
the GPU). The page holds nothing that was written by hand but its introduction.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.page import TUNED, WHOLE, page
from suite.rows import ANIMALS, PICTURE, RESULTS, append, read

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "gpu"
PREDICTED = "predicted.json"


def add(source: Path, target: Path) -> None:
    """Copy what is new, and predict for every row that was measured.

    Raises ValueError, before anything is written, when there is nothing to add or when it is of
    another card or of other settings than what lies there.
    """
    fresh = read(source / RESULTS) if (source / RESULTS).is_file() else []
    if not fresh:
        raise ValueError(f"{source} has no rows in {RESULTS}: give the --out of gpu_suite.py")
    known = read(target / RESULTS) if (target / RESULTS).is_file() else []
    kinds = {(row.on, row.small) for row in (*known, *fresh)}
    if len(kinds) > 1:
        text = " and ".join(f"{on}{', small' * small}" for on, small in sorted(kinds))
        raise ValueError(f"{target.name} would mix {text}: give another NAME")
    target.mkdir(parents=True, exist_ok=True)
    for row in (row for row in fresh if row not in known):
        append(target, row)
    for picture in (PICTURE, ANIMALS):
        if (source / picture).is_file():
            shutil.copy(source / picture, target / picture)
    found = {}
    for row in read(target / RESULTS):
        if row.step in (*WHOLE, *TUNED) and row.status == "done" and not row.small:
            print(f"predicting {row.step}, {row.case}", flush=True)
            found["/".join(row.key)] = predicted(row.figures)
    (target / PREDICTED).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def predicted(figures: Mapping[str, Any]) -> dict[str, float]:
    """The planner's peak (bytes, without the CUDA context) and FLOPs of the same update."""
    import torch

    from nablagfn.commands import planner
    from nablagfn.config import set_option
    from nablagfn.recipes.options import load_config

    config = load_config(figures["reward"])
    for key, value in figures["options"].items():
        if key != "model.guess_decoder":  # the planner does not know it
            set_option(config, key, value)
    found = planner.predict(config, torch.device("cuda"))
    return {"peak": found.peak, "flops": found.flops}


def render() -> str:
    """The page of all results under docs/gpu, newest name last."""
    results = sorted(FOLDER.glob(f"*/{RESULTS}"))
    return page([(file.parent.name, read(file), _predictions(file.parent)) for file in results])


def _predictions(folder: Path) -> dict[str, dict[str, float]]:
    file = folder / PREDICTED
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true")
    actions = p.add_subparsers(dest="action")
    adding = actions.add_parser("add", help="keep a run's results")
    adding.add_argument("folder", type=Path, help="the suite's --out")
    adding.add_argument("name", help="of the folder in docs/gpu, for example 2026-12-h100")
    given = p.parse_args(arguments)
    if given.action == "add":
        try:
            add(given.folder, FOLDER / given.name)
        except ValueError as error:
            p.error(str(error))
    text, target = render(), FOLDER / "README.md"
    if not given.check:
        FOLDER.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    elif not target.is_file() or target.read_text("utf-8") != text:
        sys.exit("docs/gpu/README.md is out of date: run `python benchmarks/gpu_report.py`")


if __name__ == "__main__":
    main()
