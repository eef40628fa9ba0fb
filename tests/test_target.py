"""`nablagfn target`: the target before any training, in worlds where it is known, on pictures."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nablagfn.cli import main
from nablagfn.commands.assemble import build_policy
from nablagfn.commands.target import Budget, TargetRequest, TargetResult, sources_of, state_target
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.evaluation import Evaluator
from nablagfn.evaluation.draws import Draws, Piece, pieces
from nablagfn.methods.build import build_kernel
from nablagfn.recipes.options import load_config
from nablagfn.runs.runfolder import RunFolder
from nablagfn.worlds.target import Target
from tests.running import run as run_command

CPU = torch.device("cpu")
IMAGES = 300


def world_config(name: str = "prompts") -> Config:
    config = load_config(f"worlds/{name}")
    set_option(config, "sampling.num_steps", 20)
    return config


def stated(out: Path, config: Config | None = None, **request: Any) -> TargetResult:
    request = {"images_per_prompt": IMAGES, "betas": (0.5, 1.5), "out": out, **request}
    return state_target(config or world_config(), TargetRequest(**request), show=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> TargetResult:
    return stated(tmp_path_factory.mktemp("target") / "world")


def test_in_a_world_it_is_the_known_target(found: TargetResult) -> None:
    """Three prompts whose rewards differ; the truth from 40,000 samples, at the world's own β."""
    config = world_config()
    policy = build_policy(config, CPU)
    targets = [
        Target.of(policy.world, build_kernel(config, policy), prompt, count=40_000)
        for prompt in policy.world.prompts
    ]
    row = found.rows[1]
    assert row.beta == policy.world.beta and row.reliable
    reward = sum(t.reward for t in targets) / 3
    log_z = sum(float((1.5 * t.rewards).exp().mean().log()) for t in targets) / 3
    for interval, truth in ((row.reward, reward), (row.kl, 1.5 * reward - log_z)):
        wide = 0.5 * (interval.high - interval.low)
        assert interval.low - wide <= truth <= interval.high + wide
    ess = sum(t.effective_size for t in targets) / 3 / 40_000
    assert row.ess.value == pytest.approx(ess, abs=0.05)
    spread = [float(t.base[:, 0].var()) for t in targets]
    assert found.base.diversity.value > row.diversity.value > 0 and min(spread) > 0


def test_its_files(found: TargetResult) -> None:
    kept = json.loads((found.folder / "target.json").read_text(encoding="utf-8"))
    assert [row["beta"] for row in kept["rows"]] == [0.5, 1.5] and kept["base"]["beta"] == 0
    assert kept["chosen"] == 1.5 and kept["images_per_prompt"] == IMAGES
    paths = sorted((found.folder / "draws").glob("*.safetensors"))
    rewards = torch.cat([load_file(path)["score.reward"] for path in paths])
    assert len(rewards.unique()) == len(rewards) == 3 * IMAGES  # no noise is used twice
    kl = [point["kl"]["value"] for point in kept["frontier"]]
    assert kl == sorted(kl) and len(kl) > 5
    for name in ("frontier.png", "pictures.png"):
        assert Image.open(found.folder / name).size[0] > 200


def test_a_second_start_draws_what_is_missing(
    found: TargetResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    drawn = Evaluator.samples

    def counting(self: Evaluator, prompts: list[str], **options: Any) -> Any:
        asked.append(len(prompts))
        return drawn(self, prompts, **options)

    monkeypatch.setattr(Evaluator, "samples", counting)
    files = sorted((found.folder / "draws").glob("*.safetensors"))
    assert len(files) == len(list(pieces(3, IMAGES))) > 3
    assert stated(found.folder).as_dict() == found.as_dict() and not asked
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:1000])  # cut short by a full disk
    assert stated(found.folder).as_dict() == found.as_dict()
    assert len(asked) == 2


def test_more_images_go_on_from_fewer(found: TargetResult, tmp_path: Path) -> None:
    few = stated(tmp_path / "few", images_per_prompt=170)
    more = stated(tmp_path / "few")
    assert few.images_per_prompt == 170
    assert [row.reward.value for row in more.rows] == [row.reward.value for row in found.rows]


def test_draws_of_other_settings_are_refused(found: TargetResult) -> None:
    config = world_config()
    set_option(config, "sampling.num_steps", 21)
    with pytest.raises(ConfigError, match="that differ in their sampler: give another --out"):
        stated(found.folder, config)


def test_budgets(found: TargetResult) -> None:
    kl = stated(found.folder, budget=Budget.read(0.5, ""))
    chosen = next(row for row in kl.rows if row.beta == kl.chosen)
    assert chosen.kl.value == pytest.approx(0.5, abs=1e-6) and len(kl.rows) == 3
    gain = stated(found.folder, budget=Budget.read(None, "1sd"))
    chosen = next(row for row in gain.rows if row.beta == gain.chosen)
    # in standard deviations of all rewards; the rewards of the three prompts have the same mean
    assert chosen.gain == pytest.approx(1, abs=1e-6)
    plain = stated(found.folder, budget=Budget.read(None, "0.4"))
    chosen = next(row for row in plain.rows if row.beta == plain.chosen)
    assert chosen.reward.value - plain.base.reward.value == pytest.approx(0.4, abs=1e-6)
    with pytest.raises(ConfigError, match="raise --images-per-prompt, or ask for less"):
        stated(found.folder, budget=Budget.read(None, "50sd"))


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file, give a folder"):
        stated(tmp_path / "file" / "deep" / "target")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--betas", "0"], "--betas 0: give numbers above 0"),
        (["--betas", "nan"], "--betas nan"),
        (["--images-per-prompt", "3"], "--images-per-prompt 3: give 4 or more"),
        (["--kl", "-1"], "--kl -1: give nats"),
        (["--kl", "9", "--images-per-prompt", "64"], "raise --images-per-prompt to 22027"),
        (["--kl", "100", "--images-per-prompt", "64"], "nats; ask for less"),
        (["--gain", "lots"], "--gain lots: give standard deviations (1sd)"),
        (["--gain", "1sd", "--kl", "1"], "give --kl or --gain, not both"),
        (["--num-prompts", "-1"], "--num-prompts -1"),
        (["--config.experiment.reward_fn=nothing"], "reward_fn"),
        (["--config.sampling.spacing=karras"], "sampling.spacing"),
        (["somewhere", "--config=demo"], "give a RUN or --config, not both"),
        (["somewhere"], "somewhere is not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["target", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_reward_without_spread_or_with_nan_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "def flat(images, prompts, metadata):\n    return images.mean((1, 2, 3)) * 0 + 1\n"
        "def wild(images, prompts, metadata):\n    return images.mean((1, 2, 3)) * float('nan')\n"
    )
    (tmp_path / "odd_reward_for_tests.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config("demo")
    set_option(config, "sampling.num_steps", 3)
    for name, said in (("flat", "scores all samples of a prompt alike"), ("wild", "not finite")):
        set_option(config, "experiment.reward_fn", f"odd_reward_for_tests:{name}")
        with pytest.raises(ConfigError, match=said):
            stated(tmp_path / name, config, images_per_prompt=4, num_prompts=2, betas=())


def test_on_pictures_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t"
    few = ["--images-per-prompt=16", "--num-prompts=3", "--gain=0.5sd", f"--out={out}"]
    main(["target", "--config=demo", "--config.sampling.num_steps=4", *few])
    text = capsys.readouterr().out
    for part in ("E*[r]", "KL*, nats", "style: glossy", "--config.model.reward_scale="):
        assert part in text
    assert "animal:" not in text  # what the prompts name is counted as recognised
    kept = json.loads((out / "target.json").read_text(encoding="utf-8"))
    shares = [row["shares"]["style: glossy"]["value"] for row in (kept["base"], kept["rows"][-1])]
    assert len(kept["rows"]) == 6 and shares[1] >= shares[0]
    width, height = Image.open(out / "pictures.png").size
    assert (width, height) == (8 * 66 - 2, 6 * 66 - 2)  # 3 prompts: base above, target below
    beyond = any(not row["reliable"] or row["beyond"] for row in kept["rows"])
    assert beyond == ("log M − 1" in " ".join(text.split()))


def test_two_processes_state_the_same(found: TargetResult, tmp_path: Path) -> None:
    arguments = ["target", "--config=worlds/prompts", "--config.sampling.num_steps=20"]
    arguments += [f"--images-per-prompt={IMAGES}", "--betas", "0.5", "1.5", f"--out={tmp_path}/t"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = run_command([*launcher, "--nproc_per_node=2", "-m", "nablagfn", *arguments])
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "t" / "target.json").read_text(encoding="utf-8"))
    known = found.as_dict()
    for mine, theirs in zip(kept["rows"], known["rows"], strict=True):
        assert mine["reward"]["value"] == pytest.approx(theirs["reward"]["value"], abs=1e-5)
        assert mine["kl"]["value"] == pytest.approx(theirs["kl"]["value"], abs=1e-5)
    assert done.stdout.count("the target p_pretrained") == 1


def test_of_a_run_it_lies_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = world_config("ring")
    run.write_json("config.json", config.model_dump(mode="json"))
    run.write_json("prompts.json", ["east"])
    result = state_target(
        config, TargetRequest(betas=(1.0,), images_per_prompt=50), run, show=False
    )
    assert result.folder == run.path / "target" and result.prompts == ("east",)
    assert (run.path / "target" / "target.json").is_file()


def test_pieces_are_a_partition() -> None:
    for prompts, images in ((1, 1000), (45, 64), (1000, 3)):
        found = list(pieces(prompts, images))
        assert [p.first for p in found[1:]] == [p.last for p in found[:-1]]
        assert found[0].first == 0 and found[-1].last == images
    assert Piece(2, 4).asked(["a", "b"]) == ["a", "b", "a", "b"]
    assert not Draws(Path("nowhere")).has(Piece(0, 1))


def test_what_it_says_of_itself_is_so(
    found: TargetResult, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that are there, none of another β; a method without a target is told of."""
    assert stated(found.folder).files == ["target.json", "frontier.png", "pictures.png"]
    kl = stated(found.folder, budget=Budget.read(0.3, ""))
    assert kl.files == ["target.json", "frontier.png"]  # a world draws its target at its own β
    stated(found.folder)
    common = ["--images-per-prompt", str(IMAGES), "--out", str(found.folder), "--kl", "0.3"]
    options = ["--config=worlds/prompts", "--config.sampling.num_steps=20"]
    main(["target", *options, "--config.experiment.method=refl", *common])
    text = " ".join(capsys.readouterr().out.split())
    assert "a run would not aim at this: refl has no prior term" in text
    assert "--config.model.reward_scale" not in text
    stated(found.folder)


def test_draws_of_unknown_settings_are_refused(tmp_path: Path) -> None:
    few = {"images_per_prompt": 4, "betas": (0.5,)}
    folder = stated(tmp_path / "t", **few).folder
    settings = folder / "draws" / "settings.json"
    for text in ("[]", "{", ""):
        settings.write_text(text, encoding="utf-8")
        if not text:
            settings.unlink()
        with pytest.raises(ConfigError, match=r"settings\.json is missing or damaged"):
            stated(folder, **few)


def test_another_reward_of_the_same_name_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "changing_reward_for_tests.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    for text in ("one", "two"):
        file.write_text(f"# {text}\n", encoding="utf-8")
        importlib.invalidate_caches()
        found = sources_of("0.5*changing_reward_for_tests:f + 2*aesthetic")
        assert list(found) == ["changing_reward_for_tests"]
        assert found["changing_reward_for_tests"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sources_of("nobody_has_this:f + aesthetic") == {}
