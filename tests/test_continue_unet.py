"""More training of tiny-animals: the pack of drawings, the clock, what an interruption costs."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

FOLDER = Path(__file__).parent.parent / "tools" / "tiny_animals"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts as modules; others of their names (benchmarks have a common.py) stay apart."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    monkeypatch.syspath_prepend(str(FOLDER))
    import common  # type: ignore[import-not-found]
    import continue_unet  # type: ignore[import-not-found]
    import data  # type: ignore[import-not-found]
    import muon  # type: ignore[import-not-found]
    import pack  # type: ignore[import-not-found]

    yield SimpleNamespace(common=common, data=data, more=continue_unet, muon=muon, pack=pack)
    for name in names & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tools: SimpleNamespace) -> SimpleNamespace:
    """A clock that the test moves, in place of the trainings'."""
    hands = SimpleNamespace(now=100.0)
    hands.monotonic = lambda: hands.now
    monkeypatch.setattr(tools.common, "time", hands)
    monkeypatch.setattr(tools.more, "time", hands)
    return hands


def made_up(data: Any) -> dict[tuple[int, int], list[Image.Image]]:
    """Drawings of two animals, half-transparent stains; cats have two poses."""
    drawings = {}
    for n, (animal, style) in enumerate((a, s) for a in (0, 2) for s in range(4)):
        found = []
        for pose in range(2 - animal // 2):
            stain = Image.new("RGBA", (90, 120))
            box = (5 + n, 7, 60 + n, 80 + 9 * pose)
            ImageDraw.Draw(stain).ellipse(box, (30 * n, 200, 90 * pose, 255 - 20 * n))
            found.append(data.fitted(stain))
        drawings[animal, style] = found
    return drawings


def one_cat(tools: SimpleNamespace, folder: Path) -> Path:
    """A pack of one drawing: 64 composites."""
    tools.pack.save_pack({(0, 0): made_up(tools.data)[0, 0][:1]}, folder / "pack.zip")
    return folder / "pack.zip"


# --------------------------------------------------------------------------------- pack


def test_a_pack_gives_back_the_same_drawings_and_composites(
    tools: SimpleNamespace, tmp_path: Path
) -> None:
    drawings = made_up(tools.data)
    assert 0 < np.asarray(drawings[0, 3][0])[..., 3].max() < 255
    tools.pack.save_pack(drawings, tmp_path / "pack.zip")
    again = tools.pack.load_pack(tmp_path / "pack.zip")
    assert list(again) == list(drawings)
    assert [len(found) for found in again.values()] == [2] * 4 + [1] * 4
    both = (itertools.chain.from_iterable(d.values()) for d in (again, drawings))
    for a, b in zip(*both, strict=True):
        assert (a.mode, a.size, a.tobytes()) == ("RGBa", b.size, b.tobytes())
    made = [tools.data.build(tools.data.on_canvases(d), 2, True, 0) for d in (drawings, again)]
    assert made[0].images.shape == (2 * 4 * 8 * 2, 64, 64, 3)
    np.testing.assert_array_equal(made[0].images, made[1].images)
    np.testing.assert_array_equal(made[0].labels(), made[1].labels())


def test_an_opaque_drawing_survives_packing(tools: SimpleNamespace) -> None:
    sprite = Image.new("RGBa", (5, 3), (9, 8, 7, 255))
    assert tools.pack._sprite_of(tools.pack._bytes_of(sprite)).tobytes() == sprite.tobytes()


def test_half_a_pack_is_one_clear_line(tools: SimpleNamespace, tmp_path: Path) -> None:
    path = one_cat(tools, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=r"pack\.zip: no whole pack .*write it again") as end:
        tools.pack.load_pack(path)
    assert "\n" not in str(end.value)


# ---------------------------------------------------------------------------- clock, state


def small_run(tools: SimpleNamespace, folder: Path, first: int = 0) -> Any:
    """A run of a small network; its checkpoints in the folder."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    return tools.more.Longer(
        folder / "more.safetensors",
        folder / "state.ckpt",
        {"policy": net},
        tools.muon.Muon(net.parameters(), lr=1e-2),
        {"policy": tools.common.Average(net, 0.9995)},
        minutes=0,
        first=first,
    )


def teach(run: Any, clock: SimpleNamespace, stop: int | None = None, seconds: float = 1) -> None:
    """Take the run's steps, each so many seconds long; break off before step ``stop``."""
    for step in run.steps():
        if step == stop:
            return
        torch.manual_seed(step)
        x = torch.randn(5, 3)
        loss = (run.modules["policy"](x) - x.sum(1, keepdim=True)).square().mean()
        run.update(loss, {"v": loss})
        clock.now += seconds


def test_training_stops_when_its_seconds_are_over(
    tools: SimpleNamespace, clock: SimpleNamespace, tmp_path: Path
) -> None:
    run = small_run(tools, tmp_path)
    run.begin(60)
    teach(run, clock, seconds=7)
    assert run.step == 9 and run.elapsed == 63  # looked at before every step
    assert tools.more.read_weights(tmp_path / "more.safetensors")[1] == 9


def test_an_interrupted_run_goes_on_bit_for_bit_from_its_state(
    tools: SimpleNamespace, clock: SimpleNamespace, tmp_path: Path
) -> None:
    straight, broken = (tmp_path / name for name in ("straight", "broken"))
    for folder in (straight, broken):
        folder.mkdir()
    run = small_run(tools, straight, first=2000)
    run.begin(60)
    teach(run, clock)
    assert run.step == 2060
    before = small_run(tools, broken, first=2000)
    before.begin(60)
    teach(before, clock, stop=2030)  # the last checkpoint is from step 2021
    after = small_run(tools, broken)
    assert (after.step, after.first, after.elapsed) == (2021, 2000, 21)
    after.begin(39)
    teach(after, clock)
    assert after.step == 2060
    for one, other in (
        (run.modules["policy"].state_dict(), after.modules["policy"].state_dict()),
        (run.averages["policy"].values, after.averages["policy"].values),
    ):
        for key in one:
            assert torch.equal(one[key], other[key]), key


def test_the_small_file_has_the_average_in_half_precision(
    tools: SimpleNamespace, clock: SimpleNamespace, tmp_path: Path
) -> None:
    run = small_run(tools, tmp_path, first=2000)
    run.begin(10)
    teach(run, clock)
    weights, step = tools.more.read_weights(tmp_path / "more.safetensors")
    assert step == 2010
    for key, value in run.averages["policy"].values.items():
        assert torch.equal(weights[key], value.half().float())


@pytest.mark.parametrize("kept", [0, 5, 300])
def test_a_truncated_checkpoint_is_one_clear_line(
    kept: int, tools: SimpleNamespace, clock: SimpleNamespace, tmp_path: Path
) -> None:
    small_run(tools, tmp_path).save()
    for path in (tmp_path / "more.safetensors", tmp_path / "state.ckpt"):
        path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SystemExit, match=r"more\.safetensors: no whole file") as end:
        tools.more.read_weights(tmp_path / "more.safetensors")
    assert "\n" not in str(end.value)
    with pytest.raises(SystemExit, match=r"state\.ckpt: no whole checkpoint; delete it"):
        small_run(tools, tmp_path)


# -------------------------------------------------------------------------- the whole script


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in capsys.readouterr().out.splitlines() if text[0] == "{"]


def test_it_trains_the_shipped_model_and_goes_on_from_its_file(
    tools: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = ["--pack", str(one_cat(tools, tmp_path)), "--device", "cpu", "--batch", "4"]
    common += ["--emphasis", "cat", "--each", "0"]
    monkeypatch.setattr(tools.more.Longer, "steps", lambda run: taken(run, 2))
    tools.more.main([*common, "--out", str(tmp_path / "a"), "--minutes", "5"])
    first = lines(capsys)
    assert first[0]["from"] == 2000 and first[0]["batch"] == 4
    assert first[-1]["step"] == 2002 and first[-1]["seconds_left"] > 0
    path = tmp_path / "a" / "more.safetensors"
    assert path.stat().st_size < 16e6
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["more.safetensors"]
    tools.more.main([*common, "--out", str(tmp_path / "b"), "--resume", str(path)])
    second = lines(capsys)
    assert second[0]["from"] == 2002 and second[-1]["step"] == 2004


def taken(run: Any, count: int) -> Iterator[int]:
    """So many steps, whatever the clock says."""
    for _ in range(count):
        yield run.step
        run.step += 1
    run.save()


def test_without_time_left_it_trains_no_step(
    tools: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--pack", str(one_cat(tools, tmp_path)), "--device", "cpu", "--batch", "4"]
    argv += ["--each", "0", "--minutes", "1", "--out", str(tmp_path)]
    tools.more.main(argv, age=60)
    assert "no time" in lines(capsys)[0]["note"]
    weights, step = tools.more.read_weights(tmp_path / "more.safetensors")
    assert step == 2000
    shipped = tools.more.weights_of(tools.more.load_pipeline(tools.more.SHIPPED))
    assert set(weights) == set(shipped)
    assert all(torch.equal(weights[k], v.half().float()) for k, v in shipped.items())


def test_minutes_zero_measures_and_writes_a_pipeline(
    tools: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tools.more, "STEPS", 1)
    shipped = tools.more.weights_of(tools.more.load_pipeline(tools.more.SHIPPED))
    other = {k: v * 0 if "conv_out" in k else v for k, v in shipped.items()}
    tools.more.write_weights(other, 7, tmp_path / "more.safetensors")
    argv = ["--minutes", "0", "--resume", str(tmp_path / "more.safetensors"), "--each", "1"]
    argv += ["--guidance", "1", "--pipeline", str(tmp_path / "pipeline"), "--device", "cpu"]
    argv += ["--emphasis", "whale"]
    tools.more.main([*argv, "--out", str(tmp_path)])
    before, after, end = lines(capsys)
    assert set(before["shipped"]["animals"]) == set(tools.data.ANIMAL_NAMES)
    assert before["shipped"] != after["now"] and end["step"] == 7
    assert Image.open(tmp_path / "before-after.png").size == (13 * 64, 64)
    again = tools.more.load_pipeline(tmp_path / "pipeline")
    assert not again.unet.conv_out.weight.any() and again.unet.conv_in.weight.any()
    size = sum(path.stat().st_size for path in (tmp_path / "pipeline").rglob("*"))
    assert abs(size - sum(p.stat().st_size for p in tools.more.SHIPPED.rglob("*"))) < 1e5


# ------------------------------------------------------------------------------- emphasis


def test_emphasis_changes_how_often_and_not_what(tools: SimpleNamespace) -> None:
    labels = np.array([(a, s, b) for a in range(3) for s in range(4) for b in range(8)])
    z0 = torch.randn(len(labels), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[str] = []

    def tokens(captions: list[str]) -> torch.Tensor:
        seen.extend(captions)
        return torch.zeros(len(captions), 16, dtype=torch.long)

    shares = np.where(labels[:, 0] == 0, 2.0, 1.0)
    alphas = torch.linspace(0.999, 0.01, 1000)
    lessons = sys.modules["train_unet"].Lessons(z0, labels, tokens, alphas, shares / shares.sum())
    one = torch.ones(1, 1, 1, 1)
    x0 = lessons.ideal(z0[:1], 1e-6 * one, one, [""], np.array([0]))
    assert torch.allclose(x0[0], z0.mean(0), atol=1e-4)  # in noise the mean of all, each once
    lessons.loss(lambda x, t, ids: x, 0, 0, 4000)
    cats, dogs = (sum(name in text.split() for text in seen) for name in ("cat", "dog"))
    assert cats / dogs == pytest.approx(2, rel=0.15)
