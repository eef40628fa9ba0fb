"""`nablagfn evaluate`: a whole run measured, resumed, shared, refused; and its figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import nablagfn
import nablagfn.commands.assemble as assemble
import nablagfn.commands.evaluate as command
from nablagfn.cli import main
from nablagfn.commands.assemble import side_by_side
from nablagfn.commands.evaluate import EvaluationRequest, evaluate, tables
from nablagfn.config import ConfigError
from nablagfn.evaluation import Measured, figures, per_prompt, thumbnails
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.recipes.options import load_config
from nablagfn.rewards import resolve
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.trainer import Trainer
from tests.test_metrics import normal
from tests.test_trainer import small_config

CPU = torch.device("cpu")
HELD_OUT = ("fox", "bee", "cow")
OPTIONS = {
    "evaluation.num_prompts": 3,
    "evaluation.images_per_prompt": 2,
    "logging.save_freq": 1,
    "sampling.guidance_scale": 1.0,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> RunFolder:
    """Two epochs of two updates on the tiny pipeline, a checkpoint after each epoch."""
    config = small_config(tmp_path_factory.mktemp("runs"), **OPTIONS)
    config.model.reward_scale = 1e4
    policy = StableDiffusionPolicy.from_pretrained(str(tiny_folder), guidance_scale=1.0)
    reward = resolve("colourfulness", CPU)
    trainer = Trainer(
        policy, reward, PromptSet(("cat", "dog"), HELD_OUT), config, show_progress=False
    )
    trainer.fit()
    return trainer.folder


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to write into."""
    return RunFolder(Path(shutil.copytree(trained.path, tmp_path / "run")))


ASKED = EvaluationRequest(images_per_prompt=2, rewards=("brightness", "colourfulness"))


@pytest.fixture(scope="module")
def whole(trained: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Evaluated once, for tests that only read."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    copy = RunFolder(Path(shutil.copytree(trained.path, folder)))
    evaluate(copy, ASKED, show=False)
    return copy


def found(folder: RunFolder) -> dict[str, Any]:
    return folder.read_json("evaluation.json")["evaluated"]


def value(model: dict[str, Any], name: str) -> float:
    return float(model["figures"][name]["value"])


def close(a: Any, b: Any, rel: float = 1e-3) -> bool:
    """Equal structure, numbers up to rounding of float32 sums.

    An upper end may be value²/lower end, where a KL's lower end of 0.003 is known to 1e-5.
    """
    if isinstance(a, dict):
        ends = {"high": 4 * rel}
        return a.keys() == b.keys() and all(close(a[k], b[k], ends.get(k, rel)) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=rel, abs=1e-5)
    return bool(a == b)


# -------------------------------------------------------------------------------- what it writes


def test_it_is_the_run_s_own_measurement(whole: RunFolder) -> None:
    """The same prompts, seeds and numbers as before and after the run, which stay in the file."""
    evaluation = whole.read_json("evaluation.json")
    base, _, last = evaluation["evaluated"]["models"]
    for model, kept in ((base, evaluation["before"]), (last, evaluation["after"])):
        assert value(model, "reward") == pytest.approx(kept["reward_mean"], rel=1e-6)
        assert value(model, "diversity") == pytest.approx(kept["diversity"], rel=1e-6)
    assert value(last, "path_kl") == pytest.approx(evaluation["after"]["path_kl"], rel=1e-5)
    assert evaluation["updates"] == 4


def test_the_file_has_every_model_and_every_figure(whole: RunFolder) -> None:
    evaluated = found(whole)
    assert evaluated["settings"] == {
        "prompts": list(HELD_OUT),  # of the run, and not those it was trained on
        "images_per_prompt": 2,
        "seed": 1234,
        "extractor": "efficientnet-lite0",
        "rewards": ["colourfulness", "brightness"],
        "trained_reward": "colourfulness",
        "resamples": 1000,
        "confidence": 0.95,
    }
    models = evaluated["models"]
    assert [(m["name"], m["update"]) for m in models] == [
        ("base", 0),
        ("update_000002", 2),
        ("update_000004", 4),
    ]
    own = {"reward", "reward_brightness", "diversity", "diversity_variance", "vendi"}
    against = {"fid", "fid_per_prompt", "kid", "mmd", "drift", "path_kl"}
    assert set(models[0]["figures"]) == own
    for model in models[1:]:
        assert set(model["figures"]) == own | against
        assert list(model["prompts"]) == list(HELD_OUT)
        assert value(model, "drift") > 0 and value(model, "path_kl") > 0
    for model in models:
        for name in ("reward", "reward_brightness"):
            figure = model["figures"][name]
            assert figure["low"] < figure["value"] < figure["high"]
            mean = sum(row[name] for row in model["prompts"].values()) / 3
            assert mean == pytest.approx(figure["value"])


def test_the_folder_of_a_model(whole: RunFolder) -> None:
    folder = whole.evaluation / "update_000004"
    assert sorted(p.name for p in whole.evaluation.iterdir()) == [
        "base",
        "update_000002",
        "update_000004",
    ]
    record = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    assert (record["columns"], record["thumbnail"], record["gap"]) == (6, [16, 16], 2)
    rows = record["samples"]
    assert [row["prompt"] for row in rows] == [p for p in HELD_OUT for _ in range(2)]
    assert [row["index"] for row in rows] == list(range(6))
    assert set(rows[0]["rewards"]) == {"colourfulness", "brightness"}
    assert rows[0]["recognised"] is None
    assert len({row["log_ratio_base"] for row in rows} | {row["log_ratio"] for row in rows}) == 12
    base = json.loads((whole.evaluation / "base" / "samples.json").read_text(encoding="utf-8"))
    assert [row["log_ratio_base"] for row in base["samples"]] == [None] * 6
    sheet = Image.open(folder / "pictures.png")
    assert sheet.size == (6 * 18 - 2, 16)
    second = torch.tensor(list(sheet.crop((18, 0, 34, 16)).tobytes())).reshape(1, 16, 16, 3) / 255
    brightness = float(resolve("brightness", CPU)(second.permute(0, 3, 1, 2), ["fox"], [{}]))
    assert brightness == pytest.approx(rows[1]["rewards"]["brightness"], abs=0.002)
    features = load_file(folder / "features.safetensors")["features"]
    assert features.shape == (6, 1280)
    drift = features - load_file(whole.evaluation / "base" / "features.safetensors")["features"]
    last = found(whole)["models"][-1]
    assert float(drift.norm(dim=1).mean()) == pytest.approx(value(last, "drift"), rel=1e-5)


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    images = torch.rand(2, 3, 512, 256)
    assert thumbnails(images).shape == (2, 3, 128, 64)
    assert float(thumbnails(images).mean()) == pytest.approx(float(images.mean()), abs=1e-2)
    assert thumbnails(images[..., :100, :100]).shape[-1] == 100
    assert thumbnails(torch.rand(5, 2)).shape == (5, 2)  # points


# -------------------------------------------------------------------------------- resuming


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that are drawn from here on."""
    names: list[str] = []
    measure = command.measure

    def recorded(plan, evaluator, name, bar):
        names.append(name)
        return measure(plan, evaluator, name, bar)

    monkeypatch.setattr(command, "measure", recorded)
    return names


def test_finished_models_are_kept_and_missing_ones_drawn_again(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder gone, one damaged, one of other weights: these are redone, to the same numbers."""
    copy = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "run")))
    names, before = drawn(monkeypatch), found(copy)
    assert evaluate(copy, ASKED, show=False) == before
    assert names == []
    shutil.rmtree(copy.evaluation / "update_000002")
    (copy.evaluation / "base" / "features.safetensors").write_bytes(b"cut")
    assert evaluate(copy, ASKED, show=False) == before
    assert names == ["base", "update_000002"]
    names.clear()
    file = copy.checkpoints / "update_000004" / "policy.safetensors"
    save_file({name: 2 * v for name, v in load_file(file).items()}, file)
    assert evaluate(copy, ASKED, show=False)["models"][1] == before["models"][1]
    assert names == ["update_000004"]
    names.clear()
    evaluate(copy, replace(ASKED, rewards=()), show=False)
    assert names == ["base", "update_000002", "update_000004"]


def test_what_was_finished_before_a_kill_is_kept(
    run: RunFolder, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = command.write_samples

    def killed(folder, *arguments):
        if folder.name == "update_000002":
            (folder.parent / ".update_000002.partial").mkdir(parents=True)
            raise KeyboardInterrupt
        return write(folder, *arguments)

    monkeypatch.setattr(command, "write_samples", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, ASKED, show=False)
    assert "evaluated" not in run.read_json("evaluation.json")
    monkeypatch.setattr(command, "write_samples", write)
    names = drawn(monkeypatch)
    evaluate(run, ASKED, show=False)
    assert names == ["update_000002", "update_000004"]
    assert found(run) == found(whole)


# -------------------------------------------------------------------------------- invariances


def test_batch_size_changes_nothing(run: RunFolder, whole: RunFolder) -> None:
    evaluate(run, replace(ASKED, batch_size=5), show=False)
    assert close(found(run), found(whole))


def test_two_processes_equal_one(run: RunFolder, whole: RunFolder, tmp_path: Path) -> None:
    """Six samples, and 12 paths of two models, by two gloo processes, started as people do."""
    alone = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "alone")))
    evaluate(alone, replace(ASKED, resample=2), show=False)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--images-per-prompt=2", "--resample=2", "--rewards", "brightness", "colourfulness"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", "-m", "nablagfn", "evaluate", str(run.path), *options],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert close(found(run), found(alone))
    assert done.stdout.count("update 4") == 1  # one table


def sets(seed: int = 0) -> tuple[Measured, Measured, list[int]]:
    """Samples of a model and of its base, and an order of them."""
    prompts = ("a", "b", "b", "a", "a", "b", "b")
    scores = {name: normal(7, 1, seed + i)[:, 0] for i, name in enumerate(("reward", "path_kl"), 1)}
    scores["recognised"] = torch.tensor([1.0, 0, 1, 1, torch.nan, 0, 1], dtype=torch.float64)
    model = Measured(prompts, normal(7, 9, seed), scores)
    base = Measured(prompts, normal(7, 9, seed + 5), scores)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed)).tolist()
    return model, base, order


def test_figures_do_not_depend_on_the_order_of_samples() -> None:
    for seed in range(3):
        model, base, order = sets(seed)
        rows = torch.tensor(order)
        settings = {"resamples": 50, "confidence": 0.9, "seed": 0}
        one = figures(model, base, **settings)
        other = figures(model[rows], base[rows], **settings)
        assert {n: i.value for n, i in one.items()} == pytest.approx(
            {n: i.value for n, i in other.items()}
        )
        again = per_prompt(model[rows], base[rows])
        for prompt, row in per_prompt(model, base).items():
            assert again[prompt] == pytest.approx(row)


def test_unknown_samples_do_not_count() -> None:
    model, base, _ = sets()
    one = figures(model, base, resamples=50, confidence=0.9, seed=0)
    assert one["recognised"].value == pytest.approx(4 / 6)
    assert per_prompt(model, base)["a"]["recognised"] == 1.0
    unknown = replace(model, scores={**model.scores, "recognised": torch.full((7,), torch.nan)})
    assert "recognised" not in figures(unknown, base, resamples=50, confidence=0.9, seed=0)


def test_a_model_equal_to_its_base_is_at_no_distance() -> None:
    model, _, _ = sets()
    same = figures(model, model, resamples=50, confidence=0.9, seed=0)
    for name in ("fid", "fid_per_prompt", "kid", "mmd", "drift"):
        assert same[name].value == pytest.approx(0, abs=1e-9)
        assert same[name].high == pytest.approx(0, abs=1e-9)


# -------------------------------------------------------------------------------- worlds, bad input


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    from nablagfn.commands.assemble import build_trainer
    from nablagfn.runs.runfolder import run_folder

    config = load_config("worlds/ring")
    config.saving.output_dir = str(tmp_path_factory.mktemp("runs"))
    config.training.num_epochs, config.sampling.num_steps = 2, 6
    config.evaluation.num_prompts = config.logging.sample_freq = 0
    config.logging.save_freq = 1
    trainer = build_trainer(config, run_folder(config, ""))
    trainer.show = trainer.observer.show = False
    trainer.fit()
    return trainer.folder


def test_a_world_is_measured_by_the_same_command(
    ring: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own measures against p*, which have no interval; points are the features."""
    monkeypatch.setattr("nablagfn.worlds.target.COUNT", 2000)
    evaluated = evaluate(ring, EvaluationRequest(images_per_prompt=120), show=False)
    base, first, last = evaluated["models"]
    assert evaluated["settings"]["extractor"] == "points"
    assert evaluated["settings"]["rewards"] == ["worlds/ring"]
    for model in (base, first, last):
        assert model["figures"]["mmd2"]["low"] is None and value(model, "mmd2") > 0
        assert value(model, "reward_target") > value(model, "reward")
    features = load_file(ring.evaluation / "base" / "features.safetensors")["features"]
    assert features.shape == (120, 2)
    assert evaluate(ring, EvaluationRequest(images_per_prompt=120), show=False) == evaluated
    record = json.loads((ring.evaluation / "base" / "samples.json").read_text(encoding="utf-8"))
    assert record["thumbnail"] is None
    assert (ring.evaluation / "base" / "pictures.png").is_file()


def test_one_in_k_paths_of_a_world_is_kept(
    ring: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the checkpoint's own samples, closer to p*; β is the one in force, if lowered."""
    monkeypatch.setattr("nablagfn.worlds.target.COUNT", 2000)
    run = RunFolder(Path(shutil.copytree(ring.path, tmp_path / "run")))
    asked = EvaluationRequest(images_per_prompt=400, resample=4)
    _, _, last = evaluate(run, asked, show=False)["models"]
    again = last["resampled"]
    assert again["paths"] == 4 and {"path_kl", "drift"}.isdisjoint(again["figures"])
    beta = run.config().model.reward_scale
    assert last["certificate"]["beta"] == beta
    for name in ("mmd2", "mode_kl"):
        assert again["figures"][name]["value"] < 0.5 * value(last, name)
    drawn_again = drawn(monkeypatch)
    assert nablagfn.evaluate_run(run.path, asked)["models"][-1] == last and not drawn_again

    checkpoint = run.checkpoints / last["name"]
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    state["guard"]["factor"] = 0.5
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    shutil.rmtree(run.evaluation / f"{last['name']}_resampled4")
    _, _, lowered = evaluate(run, asked, show=False)["models"]
    assert lowered["certificate"]["beta"] == 0.5 * beta
    assert value(again, "reward") > value(lowered["resampled"], "reward") > value(last, "reward")


def test_a_picture_of_kept_paths(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row the base model's and those that are kept, whatever the batch; one path in three
    is another picture than the checkpoint's own, and the reward's."""
    shown = [
        side_by_side(run, prompts=["fox"], seeds=(0, 1), resample=paths, out=run.path / f"{i}.png")
        for i, paths in enumerate((0, 3))
    ]
    own, kept = (np.asarray(Image.open(path)) for path in shown)
    middle = own.shape[0] // 2
    assert (own[: middle - 1] == kept[: middle - 1]).all() and (own[middle:] != kept[middle:]).any()
    config = run.config()
    config.evaluation.batch_size = 1
    run.write_json("config.json", config.model_dump(mode="json"))
    one = side_by_side(run, prompts=["fox"], seeds=(0, 1), resample=3)
    assert one.name == "update_000004_resampled3.png"
    assert np.abs(np.asarray(Image.open(one)).astype(int) - kept).max() <= 1


def test_only_a_run_with_a_target_is_resampled(run: RunFolder) -> None:
    config = run.config()
    config.experiment.method = "refl"
    run.write_json("config.json", config.model_dump(mode="json"))
    for asked in (
        lambda: evaluate(run, EvaluationRequest(resample=4), show=False),
        lambda: side_by_side(run, resample=4),
    ):
        with pytest.raises(ConfigError, match="--resample needs a target: refl has no prior term"):
            asked()
    assert not run.evaluation.exists()


BAD = {
    "--images-per-prompt 1": "at least 2",
    "--checkpoints update_000003": "update_000003; there is: update_000002",
    "--rewards brightnes": "did you mean brightness",
    "--extractor lpips": "evaluation.extractor",
    "--extractor inception": "config.reward.weights=FOLDER",
    "--prompt-file none.txt": "none.txt",
    "--prompts fox --prompt-file none.txt": "not both",
    "--num-prompts -1": "--num-prompts",
    "--batch-size -3": "evaluation.batch_size",
    "--resample 1": "--resample 1: give 2 or more paths",
    "--seeds 3": "unknown argument --seeds",
    "nowhere": "nowhere is not a run folder",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_before_the_model_is_loaded(
    options: str,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(assemble, "build_policy", loaded)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run.path), *options.split()])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and BAD[options] in error
    assert not run.evaluation.exists()


def test_a_run_without_checkpoints_is_refused(run: RunFolder) -> None:
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ConfigError, match="no checkpoint yet; there is: none"):
        evaluate(run, ASKED, show=False)


def test_prompts_and_rewards_of_elsewhere_are_refused_in_a_world(ring: RunFolder) -> None:
    with pytest.raises(ConfigError, match="'a cat' is no prompt of the world"):
        evaluate(ring, EvaluationRequest(prompts=("a cat",)), show=False)
    with pytest.raises(ConfigError, match="a world has its own reward"):
        evaluate(ring, EvaluationRequest(rewards=("brightness",)), show=False)


def test_which_prompts(run: RunFolder, tmp_path: Path) -> None:
    def chosen(**asked: Any) -> tuple[str, ...]:
        return command.make_plan(run, EvaluationRequest(**asked)).prompts

    assert chosen() == HELD_OUT
    assert chosen(num_prompts=2) == ("fox", "bee")
    assert chosen(num_prompts=9) == HELD_OUT
    assert chosen(prompts=("a", "b", "a")) == ("a", "b")
    (tmp_path / "own.txt").write_text("x\ny\n", encoding="utf-8")
    assert chosen(prompt_file=str(tmp_path / "own.txt"), num_prompts=1) == ("x",)
    (run.path / "held_out.json").unlink()  # a run of an earlier version
    assert chosen() == ("cat", "dog")


def test_samples_are_scored_again_where_their_metadata_differ(
    run: RunFolder, tmp_path: Path
) -> None:
    def settings(text: str) -> dict[str, Any]:
        (tmp_path / "own.csv").write_text(text, encoding="utf-8")
        return command.make_plan(
            run, EvaluationRequest(prompt_file=str(tmp_path / "own.csv"))
        ).settings

    plain, zero, one = map(settings, ("prompt\nx\n", "prompt,red\nx,0\n", "prompt,red\nx,1\n"))
    assert "metadata" not in plain  # so that what an earlier version has measured is kept
    assert zero == {**plain, "metadata": [{"red": "0"}]}
    assert one == {**plain, "metadata": [{"red": "1"}]}


def test_another_reward_under_the_same_name_is_measured_again(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's function is known by its file, and a reward by its options."""
    file = tmp_path / "own_reward_of_evaluate.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    def settings(*, weights: str = "", held_out: tuple[str, ...] = ()) -> dict[str, Any]:
        asked = EvaluationRequest(weights=weights, rewards=held_out)
        return command.make_plan(run, asked).settings

    plain = settings()
    assert {"sources", "reward_options"}.isdisjoint(plain)  # earlier measurements are kept
    assert settings(weights="elsewhere") == {**plain, "reward_options": {"weights": "elsewhere"}}
    found = []
    for scale in (1, 100):
        file.write_text(
            f"def score(images, prompts):\n    return {scale} * images.mean((1, 2, 3))\n"
        )
        found.append(settings(held_out=("own_reward_of_evaluate:score",)))
    assert list(found[0]["sources"]) == ["own_reward_of_evaluate"]
    assert found[0]["sources"] != found[1]["sources"]


def test_what_a_certificate_does_not_bear_is_said() -> None:
    certificates: list[dict[str, Any]] = [
        {"why": "", "notes": ["few samples"]},
        {"why": "no prior", "notes": ["few samples", "too far"]},
    ]
    models = [
        {"update": 0},
        *({"update": 6 + k, "certificate": c} for k, c in enumerate(certificates)),
    ]
    assert command.remarks({"models": models}) == [
        "update 6, 7: few samples",
        "update 7: no prior",
        "update 7: too far",
    ]


def test_ctrl_c_is_one_line(
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "make_plan", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run.path)])
    assert ended.value.code == 130 and capsys.readouterr().err == "nablagfn: stopped\n"


def test_text_alignment_is_measured_where_it_can_be(tmp_path: Path) -> None:
    config = load_config("demo")
    assert command.choose_rewards(config, EvaluationRequest(), False) == ("tiny-alignment",)
    assert command.choose_rewards(config, EvaluationRequest(rewards=()), False) == ()
    config.experiment.reward_fn = "tiny-alignment"
    assert command.choose_rewards(config, EvaluationRequest(), False) == ()
    config.evaluation.held_out_rewards = ("contrast",)
    config.pretrained.model = str(tmp_path)
    config.reward.weights = str(tmp_path)
    assert command.choose_rewards(config, EvaluationRequest(), False) == ("contrast",)
    (tmp_path / "clip").mkdir()
    assert command.choose_rewards(config, EvaluationRequest(), False) == ("contrast", "clipscore")


def test_the_tables_fit_a_screen_and_leave_nothing_out(whole: RunFolder) -> None:
    evaluated = found(whole)
    evaluated["models"] += [{**evaluated["models"][2], "update": i} for i in range(6, 9)]
    long = {"value": -1234.5, "low": -1.23e-10, "high": -1.23e-11}  # the widest that there is
    evaluated["models"][3] = {**evaluated["models"][3], "figures": {"efficiency": long}}
    console = Console(width=80)
    with console.capture() as shown:
        console.print(*tables("run", evaluated))
    text = shown.get()
    for model in evaluated["models"]:
        heading = f"update {model['update']}" if model["update"] else "base"
        assert text.count(f" {heading} ") == 1
        for name, figure in model["figures"].items():
            assert name in text and f"{figure['value']:.3g}" in text
            known = figure["low"] is not None  # pairs of two samples have no spread
            assert not known or f"{figure['low']:.3g}…{figure['high']:.3g}" in text
    assert "3 prompts x 2 samples" in text
