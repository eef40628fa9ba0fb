"""benchmarks/gpu_suite.py: nothing is lost, nothing goes on for ever, and it runs on a CPU."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"suite.{name}")


def made_up(*steps: tuple[str, str, tuple[str, ...]], limit: float = 20) -> list[Any]:
    """Steps of cases whose names say what they do: suite.child is not needed for them."""
    kind = module("steps").Step
    return [kind(name, "", why, limit, 1, cases) for name, why, cases in steps]


CHILD = """
import json, os, sys, time
from pathlib import Path
from suite.rows import Row, append
name, cases, work, out = json.loads(sys.argv[1])
if (Path(out) / "broken").exists():
    raise ImportError
for case in cases:
    since = {"case": case, "since": time.time()}
    (Path(work) / "running.json").write_text(json.dumps(since), encoding="utf-8")
    print("at", case, flush=True)
    if case.startswith("note"):
        since["figures"] = {"so far": 2}
        (Path(work) / "running.json").write_text(json.dumps(since), encoding="utf-8")
        time.sleep(600)
    if case.startswith("hang"):
        time.sleep(600)
    if case.startswith("crash"):
        os._exit(11)
    status, error = "done", ""
    if case.startswith(("raise", "last")):
        status, error = "failed", "Traceback: no"
    append(Path(out), Row(name, case, status, 0.1, "made-up", True, {"x": 1}, error))
    if case.startswith("last"):
        os._exit(5)
"""


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A suite of made-up steps; what it said lies in its `said`."""
    out, work, said = tmp_path / "out", tmp_path / "work", list[str]()
    out.mkdir()
    work.mkdir()

    def launch(step: Any, seconds: float, where: Path) -> list[str]:
        job = json.dumps([step.name, step.cases, str(where), str(out)])
        return [sys.executable, "-c", CHILD, job]

    def build(budget: float = 60) -> Any:
        kind = module("runner").Suite
        return kind(out, work, "made-up", True, budget, launch, said.append)

    yield build


def results(suite: Any) -> dict[tuple[str, str], Any]:
    return {row.key: row for row in suite.rows()}


def test_every_case_of_the_list_has_a_function_and_every_function_is_listed() -> None:
    """Steps of one module share its cases."""
    steps = module("steps").STEPS
    assert len({step.name for step in steps}) == len(steps)
    for name in {step.module for step in steps}:
        listed = [case for step in steps if step.module == name for case in step.cases]
        assert sorted(listed) == sorted(module(name).CASES), name


def test_what_fails_is_recorded_and_the_next_begins(suite: Callable[..., Any]) -> None:
    """A case that raises, one that kills its process, and a step after them."""
    one = ("first", "", ("fine", "raise", "crash", "after"))
    built = suite()
    assert built.run(made_up(one, ("second", "", ("fine",)))) == {"done": 3, "failed": 2}
    found = results(built)
    assert [row.status for row in built.rows()] == ["done", "failed", "failed", "done", "done"]
    assert found["first", "raise"].error == "Traceback: no"
    assert "exit code 11" in found["first", "crash"].error
    assert "at crash" in found["first", "crash"].error  # the end of the log
    log = (built.out / "suite.log").read_text(encoding="utf-8")
    assert "at after" in log and "===== second" in log


def test_a_case_that_hangs_ends_with_its_step(suite: Callable[..., Any]) -> None:
    built, started = suite(), time.monotonic()
    steps = made_up(("slow", "", ("fine", "hang", "never")), limit=3)
    ended = built.run([*steps, *made_up(("next", "", ("fine",)))])
    assert ended == {"done": 2, "timeout": 1, "skipped": 1}
    assert time.monotonic() - started < 15
    found = results(built)
    assert found["slow", "hang"].status == "timeout" and found["slow", "hang"].seconds > 1
    assert found["slow", "never"].status == "skipped"
    assert found["next", "fine"].status == "done"


def test_the_budget_is_kept(suite: Callable[..., Any]) -> None:
    """A step that would not fit is cut to what is left; one without a second is left out."""
    built, started = suite(budget=8), time.monotonic()
    built.run(made_up(("long", "", ("hang",)), ("late", "", ("fine",)), limit=300))
    assert time.monotonic() - started < 8
    found = results(built)
    assert found["long", "hang"].status == "timeout"
    assert found["late", "fine"].status == "skipped" and "budget" in found["late", "fine"].error


def test_a_case_that_is_cut_off_leaves_what_it_had_found(suite: Callable[..., Any]) -> None:
    built = suite()
    built.run(made_up(("slow", "", ("note then hang",)), limit=3))
    (row,) = built.rows()
    assert row.status == "timeout" and row.figures == {"so far": 2}


def test_a_process_that_dies_between_two_cases_is_begun_again(suite: Callable[..., Any]) -> None:
    """As after an error that spoils CUDA for the rest of a process."""
    built = suite()
    built.run(made_up(("one", "", ("fine", "last words", "after"))))
    assert [(row.case, row.status) for row in built.rows()] == [
        ("fine", "done"),
        ("last words", "failed"),
        ("after", "done"),
    ]


def test_a_step_that_cannot_begin_fails_once(suite: Callable[..., Any], tmp_path: Path) -> None:
    """And not once for each of its cases."""
    built = suite()
    (built.out / "broken").touch()
    assert built.run(made_up(("one", "", ("a", "b", "c")))) == {"failed": 3}
    assert (built.out / "suite.log").read_text("utf-8").count("===== one") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_suite_that_is_ended_leaves_nothing_running(number: int, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--device", "cpu", "--small"]
    command += ["--out", str(tmp_path), "--only", "tests:core"]
    parent = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored behind a shell's &
    )
    watched = psutil.Process(parent.pid)
    until = time.monotonic() + 60
    while len(found := watched.children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(found) >= 2  # the step and its pytest
    parent.send_signal(number)
    assert parent.wait(timeout=20) != 0
    gone, alive = psutil.wait_procs(found, timeout=10)
    assert not alive and len(gone) == len(found)


def test_what_was_shown_is_not_run_again(suite: Callable[..., Any], tmp_path: Path) -> None:
    """On the same card and with the same settings; a line that was cut off is not a result."""
    rows = module("rows")
    known = [
        rows.Row("first", "a", "done", 1.0, "made-up", True),
        rows.Row("first", "b", "failed", 1.0, "made-up", True),
        rows.Row("first", "c", "done", 1.0, "another card", True),
        rows.Row("first", "d", "done", 1.0, "made-up", False),
    ]
    for row in known:
        rows.append(tmp_path, row)
    file = tmp_path / rows.RESULTS
    file.write_text(file.read_text("utf-8") + '{"step": "first", "cas', encoding="utf-8")
    done = rows.shown(rows.read(file), "made-up", True)
    assert done == {("first", "a")}
    built = suite()
    built.run(made_up(("first", "", ("a", "b", "c", "d"))), done)
    assert [row.case for row in built.rows()] == ["b", "c", "d"]


def test_a_row_after_a_line_that_was_cut_off_is_whole(tmp_path: Path) -> None:
    rows = module("rows")
    (tmp_path / rows.RESULTS).write_text('{"step": "first", "ca', encoding="utf-8")
    row = rows.Row("first", "a", "done", 1.0, "made-up", True, {"x": 1.5})
    rows.append(tmp_path, row)
    (found,) = rows.read(tmp_path / rows.RESULTS)
    assert found.key == ("first", "a") and found.figures == {"x": 1.5}


@pytest.mark.parametrize("text", ["", "no json\n", "[1]\n", '{"step": [1], "case": "a"}\n', "\0\n"])
def test_a_file_of_something_else_has_no_rows(text: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(text.encode() + b"\xff\xfe")
    assert module("rows").read(tmp_path / "other") == []


def test_the_log_is_cut_and_nothing_else_is_touched(tmp_path: Path) -> None:
    """Least of all what is not the suite's."""
    rows = module("rows")
    (tmp_path / rows.LOG).write_bytes(b"x" * 9 * 2**20 + b"the end")
    for name in (*rows.MADE[2:], "thesis.pdf", "results.old"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / rows.RESULTS).write_text("x", encoding="utf-8")
    (tmp_path / rows.WEIGHTS).write_bytes(b"x" * (rows.MOST_BYTES + 1))
    before = {path.name for path in tmp_path.iterdir()}
    (said,) = rows.keep_within_limits(tmp_path)
    assert rows.WEIGHTS in said
    assert {path.name for path in tmp_path.iterdir()} == before
    log = (tmp_path / rows.LOG).read_bytes()
    assert len(log) < rows.MOST_BYTES and log.endswith(b"the end")
    assert len(rows.MADE) <= 8  # what a lender of machines carries back


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x", "--only", "nothing"], "there is no such step"),
        (["--out", "x", "--only", "updates:slow"], "fast, no_flow, hpsv2"),
        (["--out", "x", "--budget", "0"], "give seconds"),
        (["--out", "x", "--budget", "nan"], "give seconds"),
        (["--out", __file__], "that is a file"),
        (["--budget", "10"], "--out DIR is needed"),
        (["--out", "x", "--skip-done", "gone.jsonl"], "there is no such file"),
    ],
)
def test_bad_options_give_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = importlib.import_module("gpu_suite")
    with pytest.raises(SystemExit) as end:
        suite.main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (ROOT / "x").exists()


def test_the_list_needs_no_gpu_and_no_torch() -> None:
    code = "import sys, gpu_suite; gpu_suite.main(['--list']); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    for step in module("steps").STEPS:
        assert f"{step.name} " in done.stdout and step.why in done.stdout


def test_the_published_passes_give_the_same_gradients(tmp_path: Path) -> None:
    """And are more: five U-Net passes back per transition where ours are four."""
    import torch

    published, child = module("published"), module("child")
    setup = child.Setup("cpu", True, tmp_path, tmp_path, time.monotonic() + 300)
    subject = module("subject")
    trainer = subject.trainer_of(setup, subject.paths(2))
    chosen = next(trainer.collector.batches(trainer.collector.collect(0), 0, 0, trainer.objective))
    found = []
    for kind in published.KINDS[:2]:
        trainer.counts.take()
        published.learn(trainer, chosen, kind)
        learned = [*trainer.policy.parameters(), *trainer.objective.modules.parameters()]
        gradients = [p.grad.clone() for p in learned if p.grad is not None]
        found.append((trainer.counts.take()["model_evals"], gradients))
    (theirs, known), (ours, merged) = found
    clean = 2  # transitions that lead to x_N, whose guess needs no pass
    assert theirs == 8 * len(chosen.row) - 2 * clean and ours == 7 * len(chosen.row) - 2 * clean
    assert len(known) == len(merged) > 100
    for one, two in zip(known, merged, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * float(one.abs().max() + 1e-9))


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    """The smoke test: three steps of the small suite in processes of their own, and the page."""
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--device", "cpu", "--small"]
    command += ["--budget", "600", "--out", str(tmp_path), "--only", "machine", "updates:fast"]
    done = subprocess.run([*command, "profile"], capture_output=True, text=True, check=False)
    rows = module("rows").read(tmp_path / "results.jsonl")
    assert done.returncode == 0, done.stdout + (tmp_path / "suite.log").read_text("utf-8")
    assert [row.key for row in rows] == [
        ("suite", "begin"),
        ("machine", "rates"),
        ("updates", "fast"),
        ("profile", "fast"),
    ]
    assert all(row.status == "done" and row.on == "cpu" and row.small for row in rows)
    update = rows[2].figures
    assert update["paths"] == 4 and update["evals"] > 0 and update["seconds"] > 0
    text = module("page").page([("rehearsal", rows, {})])
    assert "| fast | 4 |" in text and "A rehearsal" in text


def rows_of(*rows: tuple[str, str, bool, float]) -> list[Any]:
    """(status, card, small, seconds of drawing) of updates:fast, a minute apart."""
    shape = {"paths": 4, "learn": 1.0, "step": 0.0, "peak_draw": 1, "peak_learn": 2}
    return [
        module("rows").Row(
            "updates",
            "fast",
            status,
            1.0,
            on,
            small,
            {**shape, "draw": draw, "seconds": 1 + draw, "trajectories/s": 4 / (1 + draw)},
            at=f"2026-01-01T00:{minute:02}:00Z",
        )
        for minute, (status, on, small, draw) in enumerate(rows)
    ]


def test_figures_are_not_replaced_by_a_later_failure() -> None:
    """Nor by an earlier result that is added later."""
    rows = rows_of(
        ("done", "card", False, 7.0), ("done", "card", False, 8.0), ("timeout", "card", False, 0.0)
    )
    for order in (rows, rows[::-1]):
        (kept,) = module("page").newest(order)
        assert kept.figures["draw"] == 8.0
    assert "| fast | 4 | 8.00 |" in module("page").page([("name", rows, {})])


def test_results_are_kept_once_and_kinds_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, report = module("rows"), importlib.import_module("gpu_report")
    monkeypatch.setattr(report, "FOLDER", tmp_path / "docs")
    monkeypatch.setattr(report, "predicted", lambda figures: {"peak": 5e9, "flops": 9e12})
    for name, row in (
        ("big", ("done", "card", False, 7.0)),
        ("small", ("done", "cpu", True, 99.0)),
    ):
        (tmp_path / name).mkdir()
        rows.append(tmp_path / name, rows_of(row)[0])
    for _ in range(2):
        report.main(["add", str(tmp_path / "big"), "card"])
    kept = rows.read(tmp_path / "docs" / "card" / rows.RESULTS)
    assert [row.figures["draw"] for row in kept] == [7.0]
    text = (tmp_path / "docs" / "README.md").read_text("utf-8")
    assert "| fast | 4 | 7.00 |" in text and "| 5.00 | 9 |" in text
    (tmp_path / "empty").mkdir()
    for name, said in (("small", "would mix"), ("empty", "has no rows")):
        with pytest.raises(SystemExit):
            report.main(["add", str(tmp_path / name), "card"])
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in sorted((tmp_path / "docs").iterdir())] == ["README.md", "card"]


def test_the_page_is_up_to_date() -> None:
    report = importlib.import_module("gpu_report")
    assert (ROOT / "docs" / "gpu" / "README.md").read_text("utf-8") == report.render()
