"""The report against run folders whose figures are known; `nablagfn diff` on the same."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from nablagfn.cli import main
from nablagfn.config import ConfigError, drawn_with
from nablagfn.report import build, compare, figures, tables
from nablagfn.report.diff import differing_versions, outcomes
from nablagfn.report.pictures import HEIGHT, WIDTH, encode
from nablagfn.report.read import read
from nablagfn.report.render import (
    comparison_page,
    frames,
    run_page,
    script,
    script_hash,
    shared_best,
)
from nablagfn.runs.runfolder import RunFolder
from tests.made_run import HOSTILE, colour, frontier, make

ALL = [
    "figures",
    "said",
    "target",
    "pair",
    "training",
    "samples",
    "prompts",
    "frontier",
    "curves",
    "levels",
]
ALL += ["use", "settings"]


class Page(HTMLParser):
    """What a browser would find: sections, texts, scripts, pictures, addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.without_alt = 0
        self.ids: list[str] = []
        self.text = ""
        self._script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if tag == "section":
            self.sections.append(given["id"])
        if tag == "script":
            self._script = True
            self.scripts.append("")
            assert "src" not in given
        if tag == "img":
            self.without_alt += not given.get("alt")
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [v for k, v in given.items() if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        self._script = self._script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("run") / "a_seed0").path


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page(build(RunFolder(made)).read_text(encoding="utf-8"))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> RunFolder:
    """The same run, to be changed."""
    return RunFolder(Path(shutil.copytree(made, tmp_path / "a_seed0")))


# -------------------------------------------------------------------------------- one run


def test_every_section_is_there_and_nothing_comes_from_elsewhere(page: Page) -> None:
    assert page.sections == ALL
    assert page.addresses and all(a.startswith(("data:", "#")) for a in page.addresses)
    assert page.without_alt == 0
    assert len(page.ids) == len(set(page.ids))
    anchors = {a[1:] for a in page.addresses if re.fullmatch(r"#[a-z]+", a)}
    assert anchors == set(ALL)


def test_what_users_wrote_is_text(made: Path, page: Page) -> None:
    html = RunFolder(made).report.read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert page.text.count(HOSTILE) >= 4  # a sample, a row of the table, the guard, an alt text
    assert page.scripts == [script()]
    assert f"script-src '{script_hash()}'" in html


def test_headlines_are_the_evaluated_figures_of_the_guard_s_best(made: Path) -> None:
    found = figures.cards(read(RunFolder(made)))
    reward, diversity, recognised, path_kl, held_out, kid = found
    assert [card.headline for card in found] == 5 * [True] + [False] and kid.after == "0.500"
    assert (reward.before, reward.after, reward.change) == ("0", "2.000", "+1.00 σ")
    assert reward.interval == "1.500 to 2.500"
    assert (diversity.before, diversity.after) == ("0.800", "0.760")
    assert diversity.change == "95.0% kept"
    assert (recognised.after, recognised.change) == ("90.0%", "+0.0 points")
    assert (held_out.name, held_out.after) == ("held-out", "-0.100")
    assert (path_kl.before, path_kl.after) == ("", "7.000")


def test_without_evaluate_the_training_s_own_figures_stand(copy: RunFolder) -> None:
    evaluation = copy.read_json("evaluation.json")
    del evaluation["evaluated"]
    copy.write_json("evaluation.json", evaluation)
    found = figures.outcome(read(copy))
    assert found.gain and found.kept and found.recognised is not None
    assert (found.gain.value, found.kept.value, found.path_kl) == (1.0, 0.5, 3.0)
    assert found.recognised == pytest.approx(-10)
    assert not {"samples", "prompts", "frontier"} & set(Page(run_page(read(copy))).sections)


def test_the_frontier_runs_from_the_base_over_the_checkpoints(made: Path) -> None:
    record = read(RunFolder(made))
    gains = [figures.gain(record, model) for model in record.models]
    kept = [figures.kept(record, model) for model in record.models]
    assert [(g.low, g.value, g.high) for g in gains if g] == [
        (-0.25, 0.0, 0.25),
        (0.75, 1.0, 1.25),
        (2.3125, 2.5625, 2.8125),
    ]
    assert [round(k.value, 9) for k in kept if k] == [1.0, 0.95, 0.75]
    assert [round(k.high or 0, 9) for k in kept if k] == [1.05, 1.0, 0.8]


def test_the_certificate_of_the_guard_s_best_is_shown(made: Path, page: Page) -> None:
    record = read(RunFolder(made))
    table = tables.certificate(record)
    assert table is not None
    rows = {row[0]: row[1:3] for row in table.rows}
    assert rows["efficiency"] == ["25.0%", "20.0% to 30.0%"]
    assert rows["path KL"] == ["7.000", "6.000 to 8.000"] and rows["ESS"] == ["6.2%", "–"]
    for text in ("β = 1000", "step 1 of 3", "spends most: 86%", "best possible", HOSTILE):
        assert text in page.text


AGAINST_TARGET = {
    "beta": 0.5,
    "samples": 16,
    "effective_samples": 12.0,
    "target_reward": 2.5,
    "target_kl": 0.25,
    "gain_reached": 0.4,
    "least_kl": None,
    "shares": {"style: glossy": {"before": 0.25, "after": 0.5, "target": 0.75}},
}


def test_what_was_reached_stands_beside_the_target(copy: RunFolder) -> None:
    evaluation = copy.read_json("evaluation.json")
    copy.write_json("evaluation.json", {**evaluation, "against_target": AGAINST_TARGET})
    table = tables.reached(read(copy))
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["reward"][2] == "2.500" and rows["style: glossy"] == ["25.0%", "50.0%", "75.0%"]
    assert rows["gain of the reward"][1] == "40.0%" and rows["least KL"][1] == "–"
    assert "12 carry the target" in " ".join(Page(run_page(read(copy))).text.split())
    unknown = {**AGAINST_TARGET, "target_reward": None}
    copy.write_json("evaluation.json", {**evaluation, "against_target": unknown})
    assert tables.reached(read(copy)) is None


def test_a_target_with_more_images_of_the_same_prompts_draws_the_frontier(copy: RunFolder) -> None:
    record = read(copy)
    assert [point.kl.value for point in record.best] == [0, 1, 2, 3, 4]
    settings = drawn_with(record.config)
    target = {"frontier": frontier()[:2], "images_per_prompt": 64, "prompts": ["other"]}
    target["settings"] = settings
    copy.write_json("target/target.json", target)
    assert len(read(copy).best) == 5
    copy.write_json("target/target.json", {**target, "prompts": list(record.prompts)})
    assert len(read(copy).best) == 2
    Image.new("RGB", (40, 20), "red").save(copy.path / "target" / "pictures.png")
    assert "what a perfect finetune would draw" in Page(run_page(read(copy))).text
    other = {**settings, "sampler": {**settings["sampler"], "num_steps": 2}}  # another p_pretrained
    mine = {**target, "prompts": list(record.prompts), "settings": other}
    copy.write_json("target/target.json", mine)
    assert len(read(copy).best) == 5
    assert "what a perfect finetune would draw" not in Page(run_page(read(copy))).text
    copy.write_json("target/target.json", {"frontier": "none"})
    with pytest.raises(ConfigError, match=r"target\.json is damaged"):
        read(copy)


def pixel(url: str) -> tuple[int, ...]:
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return image.convert("RGB").getpixel((image.width // 2, image.height // 2))  # type: ignore


def test_best_and_worst_samples_are_cut_out_beside_their_base_picture(made: Path) -> None:
    found = tables.extremes(read(RunFolder(made)))
    assert found is not None
    assert [s.reward for s in found.best] == ["4.000", "3.000", "3.000", "2.000"]
    assert [s.reward for s in found.worst] == ["2.000", "1.000", "1.000", "0"]
    best, worst = found.best[0], found.worst[-1]
    assert (best.prompt, best.reward_before) == (HOSTILE, "0")
    assert (worst.prompt, worst.reward_before) == ("a cat", "-3.000")
    for shown, place in ((best, 7), (worst, 0)):
        assert pixel(shown.picture.url) == colour("update_000002", place)
        assert shown.before and pixel(shown.before.url) == colour("base", place)


@pytest.mark.parametrize(
    "value, words",
    [
        *((None, "–"), (0.0, "0"), (-0.0, "0"), (-1.2345, "-1.234"), (12.34, "12.3")),
        *((7991.2, "7,991"), (2e7, "2e+07"), (0.001, "0.001"), (float("inf"), "inf")),
    ],
)
def test_numbers_have_the_digits_that_count(value: float | None, words: str) -> None:
    assert figures.number(value) == words
    assert figures.number(0.1234, "recognised") == "12.3%"


def test_big_pictures_are_made_small(tmp_path: Path) -> None:
    small = encode(Image.new("RGB", (300, 200), (200, 10, 90)))
    assert (small.width, small.height) == (300, 200) and pixel(small.url) == (200, 10, 90)
    noise = Image.effect_noise((4000, 3000), 80).convert("RGB")
    big = encode(noise)
    assert big.width == WIDTH and big.height == 1200 and len(big.url) < 2_000_000
    tall = encode(Image.new("RGB", (100, 3 * HEIGHT)))
    assert (tall.width, tall.height) == (33, HEIGHT)


MISSING = {
    "evaluation.json": {"figures", "target", "samples", "prompts", "frontier"},
    "metrics.jsonl": {"curves"},
    "diagnostics.jsonl": {"levels"},
    "grids": {"pair", "training"},
    "evaluation": {"samples"},
    "checkpoints": {"use"},
    "versions.json": set(),
    "prompts.json": set(),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_left_out(copy: RunFolder, name: str) -> None:
    path = copy.path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    sections = Page(run_page(read(copy))).sections
    assert set(ALL) - set(sections) == MISSING[name]


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    begun = make(tmp_path / "begun")
    for path in begun.path.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Page(run_page(read(begun))).sections == ["settings"]
    assert "0 updates" in run_page(read(begun))


def rewrite(name: str, change: Callable[[dict], object]) -> Callable[[RunFolder], None]:
    def damage(folder: RunFolder) -> None:
        content = folder.read_json(name)
        change(content)
        folder.write_json(name, content)

    return damage


def put(name: str, text: str) -> Callable[[RunFolder], None]:
    return lambda folder: (folder.path / name).write_text(text, encoding="utf-8") and None


DAMAGES = {
    "evaluation.json cut": put("evaluation.json", '{"before": {'),
    "evaluation.json of another kind": put("evaluation.json", "[1, 2]"),
    "evaluation.json not UTF-8": lambda f: (f.path / "evaluation.json").write_bytes(b'"\xff"'),
    "evaluation.json without a mean": rewrite(
        "evaluation.json", lambda e: e["before"].pop("reward_mean")
    ),
    "evaluation.json with a word for a figure": rewrite(
        "evaluation.json", lambda e: e["evaluated"]["models"][1]["figures"].update(reward="high")
    ),
    "guard.json": put("guard.json", '{"best": 3}'),
    "versions.json": put("versions.json", "[]"),
    "prompts.json": put("prompts.json", '{"a": 1}'),
    "metrics.jsonl without an update": put("metrics.jsonl", '{"reward": 1.0}\n'),
    "metrics.jsonl with a word": put("metrics.jsonl", '{"update": 1, "reward": "high"}\n'),
    "metrics.jsonl a list": put("metrics.jsonl", "[1]\n"),
    "diagnostics.jsonl": put("diagnostics.jsonl", '{"update": 1, "steps": 3}\n'),
    "samples.json": put("evaluation/base/samples.json", '{"columns": 0, "samples": []}'),
    "a grid": lambda f: (f.grids / "after.png").write_bytes(b"\x89PNG\r\n\x1a\n cut"),
    "pictures.png": lambda f: Image.new("RGB", (9, 9)).save(
        f.path / "evaluation" / "base" / "pictures.png"
    ),
    "config.json": put("config.json", '{"training": {"lr": "much"}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("several", [False, True])
def test_a_damaged_file_is_one_line_and_nothing_is_written(
    made: Path,
    copy: RunFolder,
    damage: str,
    several: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy.report.write_text("old", encoding="utf-8")
    DAMAGES[damage](copy)
    out = copy.path.parent / "both.html"
    command = ["report", str(copy.path)]
    if several and damage == "pictures.png":
        pytest.skip("not read for a comparison")
    with pytest.raises(SystemExit) as caught:
        main([*command, str(made), f"--out={out}"] if several else command)
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert told.startswith("nablagfn: error: ") and len(told.splitlines()) == 1
    assert str(copy.path) in told or "config.training.lr" in told
    assert copy.report.read_text(encoding="utf-8") == "old" and not out.exists()


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "not a run folder" in capsys.readouterr().err


def test_frames_are_in_order_and_say_when(made: Path) -> None:
    assert [frame.label for frame in frames(read(RunFolder(made)))] == [
        "the pretrained model",
        "epoch 2, update 2",
        "epoch 4, update 4",
    ]


# -------------------------------------------------------------------------------- several runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        make(folder / "one"),
        make(folder / "two", model__reward_scale=7.0, saving__output_dir="elsewhere"),
        make(folder / "three", experiment__method="refl", training__lr=0.5),
    ]


def test_a_comparison_has_all_runs_and_what_differs(runs: list[RunFolder], tmp_path: Path) -> None:
    page = Page(compare(runs, tmp_path / "new" / "c.html").read_text(encoding="utf-8"))
    assert page.sections == ["frontier", "plane", "outcomes", "pictures", "differences"]
    assert all(a.startswith(("data:", "#")) for a in page.addresses) and page.without_alt == 0
    for text in ("nabla-db", "refl", "β = 7", "β = 1000", "no β", "one", "two", "three"):
        assert text in page.text
    assert tables.differences([read(run) for run in runs]) == [
        ["training.lr", "0.001", "0.001", "0.5"],
        ["model.reward_scale", "1000", "7", "1000"],
        ["experiment.method", "nabla-db", "nabla-db", "refl"],
    ]


def test_a_comparison_stands_under_the_frontier(
    runs: list[RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = comparison_page([read(run) for run in runs])
    assert "Reward for the KL spent" in page and "best possible" in page
    folder = RunFolder(tmp_path / "target")
    names = [str(run.path) for run in runs]
    out = f"--out={tmp_path / 'page.html'}"
    with pytest.raises(SystemExit):
        main(["report", *names, out, f"--target={folder.path}"])
    assert "has no target.json" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
    settings = drawn_with(read(runs[0]).config)
    other = {**settings, "reward": ["another", {}]}
    folder.write_json("target.json", {"frontier": frontier(), "settings": other})
    with pytest.raises(SystemExit):
        main(["report", *names, out, f"--target={folder.path}"])
    assert "is of another reward than" in capsys.readouterr().err
    folder.write_json("target.json", {"frontier": frontier(), "settings": settings})
    main(["report", *names, out, f"--target={folder.path}"])
    assert "best possible" in (tmp_path / "page.html").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["report", names[0], f"--target={folder.path}"])
    assert "--target is for several runs" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"pretrained__model": "other"}, {"reward__clamp": ("a=0:1",)}])
def test_a_frontier_is_borrowed_by_runs_of_its_own_model_and_reward_only(
    options: dict[str, object], runs: list[RunFolder], tmp_path: Path
) -> None:
    own = [read(run) for run in runs]
    assert "best possible" in comparison_page(own)
    other = read(make(tmp_path / "other", **options))
    assert shared_best([*own, other]) == [] != shared_best(own)
    page = comparison_page([*own, other])
    assert "Reward for the KL spent" in page and "best possible" not in page


def test_a_frontier_of_other_prompts_is_not_borrowed(runs: list[RunFolder], tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    evaluation = other.read_json("evaluation.json")
    evaluation["evaluated"]["settings"]["prompts"] = ["a dog"]
    other.write_json("evaluation.json", evaluation)
    assert shared_best([read(runs[0]), read(other)]) == []


def test_a_run_without_figures_stays_in_the_table(runs: list[RunFolder], tmp_path: Path) -> None:
    bare = make(tmp_path / "bare")
    (bare.path / "evaluation.json").unlink()
    page = Page(comparison_page([read(runs[0]), read(bare)]))
    assert "bare" in page.text and "frontier" in page.sections
    assert "frontier" not in Page(comparison_page([read(bare), read(bare)])).sections


def test_diff_shows_outcomes_settings_and_versions(
    runs: list[RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    one, three = runs[0], runs[2]
    three.write_json("versions.json", {"torch": "3.0", "device": "cpu", "command": "x"})
    a, b = read(one), read(three)
    assert differing_versions(a, b) == [["torch", "2.0", "3.0"], ["processes", "1", "–"]]
    assert outcomes(a, b)[:2] == [
        ["gain (σ)", "+1.00", "+1.00"],
        ["diversity kept", "95.0%", "95.0%"],
    ]
    main(["diff", str(one.path), str(three.path)])
    shown = capsys.readouterr().out
    assert "experiment.method" in shown and "refl" in shown and "model.reward_scale" not in shown


def test_out_is_for_several_runs(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(made), "--out=x.html"])
    assert "--out is for several runs" in capsys.readouterr().err
