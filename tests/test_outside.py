"""A reward, a method, a sampler, a world and a model family from outside the package: a file each.

Each file is what CONTRIBUTING.md asks for, and goes through the command line as a user's would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nablagfn.cli import main
from nablagfn.runs.runfolder import RunFolder
from tests.tiny_pipeline import save_pipeline

REWARD = '''
def redness(images, prompts, metadata):
    """How red the pictures are, and how red their prompt file wants them."""
    wanted = [float(entry.get("red", 1)) for entry in metadata]
    return images[:, 0].mean((1, 2)) * images.new_tensor(wanted)
'''
METHOD = '''
import torch
from torch import nn

from nablagfn.core import kernels
from nablagfn.core.types import Losses, Objective
from nablagfn.methods.record import Alive, Method


class OneStep(Objective):
    """Climbs the reward at the predicted clean sample of the last step."""

    def __init__(self, parts):
        self.policy, self.table, self.log_reward = parts.policy, parts.table, parts.log_reward
        self.modules = nn.ModuleDict()

    def choose(self, num_steps, generator):
        return torch.tensor([num_steps - 1])

    def losses(self, batch):
        k = self.table.at(batch.step, batch.x)
        with torch.enable_grad():
            output = self.policy.output(batch.x, k.here.time, batch.condition)
            x_clean = kernels.predict_clean(batch.x, output, k.here)
            return Losses({"reward": -self.log_reward(x_clean, batch.condition)})


ONE_STEP = Method("one-step", OneStep, has_prior=False, alive=lambda config: Alive(1, 0))
'''
SAMPLER = '''
from nablagfn.core.samplers import Sampler


def squared(noising, num_steps):
    """Times that crowd at the clean end."""
    last = noising.noisiest
    times = [max(n, round(last * (n / num_steps) ** 2)) for n in range(1, num_steps + 1)]
    return times[::-1]


SQUARED = Sampler("squared", squared, eta=0.8)
'''
WORLD = """
from nablagfn.worlds.mixture import Mixture, Quadratic
from nablagfn.worlds.world import FLOW, World, vector

WORLD = World(
    title="two modes on a line",
    mixture=Mixture(
        means=vector(-1.0, 1.0)[:, None], weights=vector(0.5, 0.5), variances=vector(0.04)
    ),
    reward=Quadratic.linear(vector(1.0)[None]),
    beta=1.0,
    prompts=("right",),
    noising=FLOW,
    prediction="flow",
)
"""
FAMILY = '''
from dataclasses import replace

from nablagfn.families.stable_diffusion import STABLE_DIFFUSION


def darker(config, device, shard):
    """Stable Diffusion whose pictures are half as bright."""
    policy = STABLE_DIFFUSION.load(config, device, shard)
    bright = policy._decode
    policy._decode = lambda x: bright(x) / 2
    policy.model.family = "outside_family:DARK"
    return policy


DARK = replace(STABLE_DIFFUSION, name="dark", load=darker, claims=lambda model: False)
'''
SMALL = {
    "sampling.num_steps": 4,
    "sampling.batch_size": 2,
    "sampling.num_batches_per_epoch": 1,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.num_epochs": 1,
    "model.flow_channel_width": "8,16",
    "evaluation.num_prompts": 2,
    "evaluation.images_per_prompt": 2,
    "logging.tensorboard": False,
    "experiment.reward_fn": "brightness",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, from where everything is started."""
    for name in ("outside_reward", "outside_method", "outside_sampler", "outside_family"):
        sys.modules.pop(name, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def run(pipeline: Path, *arguments: str, command: str = "train", **changed: str) -> RunFolder:
    """One small run, or another command with the same options; group__name=value changes them."""
    options = {**SMALL, "pretrained.model": pipeline}
    options |= {name.replace("__", "."): value for name, value in changed.items()}
    given = [f"--config.{name}={value}" for name, value in options.items()]
    main([command, *given, *arguments, *(["--exp_name=mine"] if command == "train" else [])])
    (found,) = Path("runs").iterdir()
    return RunFolder(found)


@pytest.mark.usefixtures("no_report")
def test_a_reward(here: Path, pipeline: Path) -> None:
    """With metadata of its own from the prompt file, in training and when measuring."""
    (here / "outside_reward.py").write_text(REWARD, encoding="utf-8")
    (here / "prompts.csv").write_text("prompt,red\na cat,0\na dog,0\n", encoding="utf-8")
    folder = run(
        pipeline,
        experiment__reward_fn="outside_reward:redness",
        experiment__prompt_fn="prompts.csv",
    )
    assert folder.metrics()[0]["reward"] == 0
    assert folder.read_json("evaluation.json")["before"]["reward_mean"] == 0
    assert folder.about() == {"a cat": {"red": "0"}, "a dog": {"red": "0"}}
    main(["evaluate", str(folder.path), "--images-per-prompt=2", "--rewards"])
    evaluated = folder.read_json("evaluation.json")["evaluated"]
    assert evaluated["models"][0]["figures"]["reward"]["value"] == 0


def test_a_method(here: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "outside_method.py").write_text(METHOD, encoding="utf-8")
    method = "outside_method:ONE_STEP"
    folder = run(pipeline, experiment__method=method)
    assert "loss_reward" in folder.metrics()[0] and "loss_forward" not in folder.metrics()[0]
    capsys.readouterr()
    run(pipeline, command="plan", experiment__method=method)
    assert "U-Net" in capsys.readouterr().out
    main(["report", str(folder.path)])
    assert "outside_method:ONE_STEP" in folder.report.read_text(encoding="utf-8")
    (here / "outside_method.py").unlink()
    sys.modules.pop("outside_method")
    main(["report", str(folder.path)])  # on a machine that does not have it


def test_a_sampler(here: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "outside_sampler.py").write_text(SAMPLER, encoding="utf-8")
    folder = run(pipeline, sampling__scheduler="outside_sampler:SQUARED")
    assert folder.metrics()[0]["model_evals"] > 0
    text = folder.report.read_text(encoding="utf-8")
    assert "no scheduler of diffusers draws as" in text and "nablagfn sample" in text
    with pytest.raises(SystemExit):
        main(["export", str(folder.path)])
    told = capsys.readouterr().err
    assert "no scheduler of diffusers draws as" in told and len(told.splitlines()) == 1


@pytest.mark.usefixtures("no_report")
def test_a_world(here: Path) -> None:
    (here / "my_world.py").write_text(WORLD, encoding="utf-8")
    options = ["--config.training.num_epochs=3", "--config.logging.sample_freq=0"]
    main(["train", "--config=my_world.py", *options, "--config.evaluation.images_per_prompt=200"])
    (found,) = Path("runs").iterdir()
    after = json.loads((found / "evaluation.json").read_text(encoding="utf-8"))["after"]
    assert after["others"]["mode_kl"] >= 0


@pytest.mark.usefixtures("no_report")
def test_a_family(here: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "outside_family.py").write_text(FAMILY, encoding="utf-8")
    plain = run(pipeline)
    bright = plain.read_json("evaluation.json")["before"]["reward_mean"]
    plain.path.rename(here / "plain")
    folder = run(pipeline, pretrained__family="outside_family:DARK")
    dark = folder.read_json("evaluation.json")["before"]["reward_mean"]
    assert dark == pytest.approx(bright / 2, rel=1e-3)
    assert folder.config().pretrained.family == "outside_family:DARK"
    main(["sample", str(folder.path), "--out", "sample.png"])
    assert (here / "sample.png").is_file()
    capsys.readouterr()
    run(pipeline, command="doctor", pretrained__family="outside_family:DARK")
    assert "outside_family" not in capsys.readouterr().err
