"""docs/frontier.md and its plots from the runs of tools/frontier.py; nothing is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from frontier_run import SHARES, Outcome, Study
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes

from nablagfn.commands.target import TargetResult
from nablagfn.report import kl_frontier
from nablagfn.report.read import FigureRow

matplotlib.use("agg")
from matplotlib import pyplot as plt


def blank() -> Axes:
    """The panel of a new figure."""
    return plt.subplots(figsize=(8, 4.8), layout="constrained")[1]


def finish(panel: Axes, about: str, path: Path) -> None:
    """Title and legend; the figure's file."""
    panel.set_title(about, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(path, dpi=120)
    plt.close()


def draw(found: Sequence[Outcome], minutes: float, path: Path) -> None:
    """Share of the target's gain to the right, diversity upwards; the target is at 100 %."""
    panel = blank()
    for i, o in enumerate(found):
        color = plt.get_cmap("tab20")(i % 20)
        x, y = 100 * o.gain, o.diversity
        panel.scatter(x, y, s=45, color=color, label=o.run.label)
    at = found[0].beside.target_diversity
    panel.scatter(100, at, s=130, marker="*", color="black", label="target")
    panel.axvline(0, color="0.8", lw=0.8, zorder=0)
    if at is not None:
        lowest = min(at, *(o.diversity for o in found))
        panel.set_ylim(0.9 * lowest, 1.1 * at)  # a thousandth is no difference to be seen
    panel.set_xlabel("gain of reward, % of the target's")
    panel.set_ylabel("diversity within prompts")
    finish(panel, f"tiny-animals, {minutes:g} minutes of one core each", path)


def draw_under_the_best(
    found: Sequence[Outcome], target: TargetResult, minutes: float, path: Path
) -> None:
    """Reward from the target's own start against the KL that was spent, under the best."""
    start = target.base.reward.value  # of other noise than the runs': what was gained is compared
    spent = [
        kl_frontier.Spent(
            FigureRow(value=o.path_kl),
            FigureRow(value=start + o.reward - o.before),
            "",
            o.run.label,
        )
        for o in found
    ]
    panel = blank()
    kl_frontier.draw(panel, target.frontier, spent)
    panel.set_xlabel(kl_frontier.X_LABEL)
    finish(panel, f"tiny-animals, {minutes:g} minutes of one core each", path)


def known(value: float | None, form: str = ".0%") -> str:
    """A figure, or a dash for what is not known."""
    return "–" if value is None else f"{value:{form}}"


def minutes_of(seconds: float | None) -> str:
    return known(None if seconds is None else seconds / 60, ".1f")


def longer_by(study: Study, found: Sequence[Outcome]) -> list[str]:
    """How long the published method takes for what ours has reached, by share of the gain."""
    times = {o.run.label: o.times for o in found}
    if not {study.ours, study.published} <= set(times):
        return []
    told = []
    for share, own, theirs in zip(SHARES, times[study.ours], times[study.published], strict=True):
        if own is None:
            told.append(f"{share:.0%}: not reached by ours")
        elif theirs is None:
            told.append(f"{share:.0%}: more than {60 * study.minutes / own:.2g} times as long")
        else:
            told.append(f"{share:.0%}: {theirs / own:.2g} times as long")
    return told


def write(study: Study, docs: Path, target: TargetResult) -> Path:
    """docs/frontier.md and its plots."""
    tables = {name: study.rows(name) for name in ("demo", "method", "long")}
    compared = [o for _, o in tables["method"] if o is not None]
    (docs / "images").mkdir(parents=True, exist_ok=True)
    if compared:
        draw(compared, study.minutes, docs / "images" / "frontier.png")
        path = docs / "images" / "frontier_kl.png"
        draw_under_the_best(compared, target, study.minutes, path)
    here = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    here.filters |= {"known": known, "minutes": minutes_of}
    page = docs / "frontier.md"
    text = here.get_template("frontier.md.j2").render(
        study=study,
        tables=tables,
        done=sum(o is not None for rows in tables.values() for _, o in rows),
        at=next(row for row in target.rows if row.beta == study.beta),
        base=target.base,
        longer=longer_by(study, compared),
    )
    page.write_text(text, encoding="utf-8")
    return page
