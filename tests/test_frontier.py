"""The queue of `make proofs-pictures`: what is kept, told and left empty (no training here)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nablagfn.evaluation.reached import LabelShares, Reached
from nablagfn.metrics.intervals import Interval
from nablagfn.recipes.options import apply_overrides, load_config

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import frontier
    import frontier_page
    import frontier_run

    return SimpleNamespace(queue=frontier, page=frontier_page, run=frontier_run)


def ended(folder: Path, *, gain: float, probes: list[tuple[float, float]]) -> None:
    """What a run that ended leaves. probes: seconds and gain in reward; the target's is 0.2."""
    folder.mkdir(parents=True)
    shares = {"background: yellow": LabelShares(0.13, 0.23, 0.42)}
    beside = Reached(6.0, 360, 100.0, 0.3, 0.7, 0.9, 0.92, gain, 0.1, 0.25, shares)
    figures = {"reward_mean": 0.1, "path_kl": 0.0, "diversity": 0.9, "recognised": 0.95}
    after = {**figures, "reward_mean": 0.1 + 0.2 * gain, "path_kl": 0.4}
    evaluation = {"before": figures, "after": after, "against_target": beside.as_dict()}
    rows = [
        {"update": i, "seconds": s, "probe_gain": g, "probe_path_kl": 0.1 * i, "cosine": 0.5}
        for i, (s, g) in enumerate(probes, 1)
    ]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "proof.json").write_text(json.dumps({"diverged": False, "cpu_seconds": 1}))


def test_every_run_of_the_queue_is_a_valid_command(tools: SimpleNamespace, tmp_path: Path) -> None:
    runs = tools.queue.queue()
    assert len({run.folder(tmp_path).path for run in runs}) == len(runs)
    for run in runs:
        _, recipe, *settings = run.arguments(tmp_path)
        given = [setting for setting in settings if setting.startswith("--config.")]
        config = apply_overrides(load_config(recipe.removeprefix("--config=")), given)
        assert config.experiment.reward_fn == "warmth" and config.model.reward_scale == 6
        assert config.training.max_minutes == (8 if run.table == "method" else 0)
        assert not run.done(tmp_path)


def test_the_time_to_a_share_is_on_the_line_between_probes(tools: SimpleNamespace) -> None:
    curve = [(100.0, 0.2, 0.1), (200.0, 0.4, 0.2), (300.0, 0.3, 0.2)]
    assert tools.run.reached_at(curve, 0.1) == pytest.approx(50)
    assert tools.run.reached_at(curve, 0.25) == pytest.approx(125)
    assert tools.run.reached_at(curve, 0.5) is None


def test_the_page_tells_what_was_run_and_leaves_the_rest_empty(
    tools: SimpleNamespace, tmp_path: Path
) -> None:
    queue, out = tools.queue, tmp_path / "runs"
    runs = {(run.table, run.label, run.seed): run for run in queue.queue()}
    ours, published = runs["method", queue.LINEAR, 0], runs["method", queue.FIRST[0], 0]
    ended(ours.folder(out).path, gain=0.43, probes=[(100, 0.05), (200, 0.1)])
    ended(published.folder(out).path, gain=0.2, probes=[(300, 0.05), (480, 0.06)])
    ended(runs["demo", "make demo", 1].folder(out).path, gain=0.41, probes=[(60, 0.08)])
    ended(runs["long", "rank 8, attention", 0].folder(out).path, gain=0.5, probes=[(9, 0.1)])
    assert ours.done(out)
    climbing = runs["method", "DRaFT-4", 0]  # has no prior, and so no target of its own
    ended(climbing.folder(out).path, gain=2.0, probes=[(30, 0.3)])
    file = climbing.folder(out).path / "evaluation.json"
    found = json.loads(file.read_text())
    del found["against_target"]
    file.write_text(json.dumps(found))
    at = SimpleNamespace(
        beta=6.0, kl=Interval(0.8), diversity=Interval(0.9), recognised=Interval(0.92)
    )
    target = SimpleNamespace(
        rows=[at],
        base=SimpleNamespace(diversity=Interval(0.905), reward=Interval(0.1)),
        frontier=(),
    )
    study = tools.run.Study(queue.queue(), out, 6.0, 8.0, queue.LINEAR, queue.FIRST[0])
    page = tools.page.write(study, tmp_path, target).read_text(encoding="utf-8")
    lines = page.splitlines()
    assert "from 5 of 20 runs" in page
    assert "| DRaFT-4 | 1 in 0.5 | 200% | 0.40 | – | – | 0.900 | 95.0% | 0.1 | 0.2 |" in lines
    assert [line for line in lines if line.startswith("| 1 |") and "| 41% |" in line]
    assert "| 0 | – | – | – | – | – | – | – | – |" in lines
    (row,) = [line for line in lines if line.startswith(f"| {queue.LINEAR} |")]
    assert "| 43% | 0.40 | 0.100 | 25.0% |" in row and row.endswith("| 1.7 | 3.3 |")
    assert "25%: 3 times as long; 50%: more than 2.4 times as long" in page
    assert f"* {queue.LINEAR}: 1.7: 25% at 0.10; 3.3: 50% at 0.20" in lines
    assert "| rank 16, all layers | – | – | – | – | – |" in lines
    assert (tmp_path / "images" / "frontier.png").stat().st_size > 1000
