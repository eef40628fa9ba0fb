"""Each family through the command line: train, go on, export, doctor, plan, the printed programs.

`make conformance` also runs every method on every family, and a killed run that goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nablagfn.cli import main
from nablagfn.config import Config, set_option
from nablagfn.families import FAMILIES
from nablagfn.methods.registry import METHODS
from nablagfn.models.latent import quiet
from nablagfn.report.loading import how_to_load
from nablagfn.runs.runfolder import RunFolder
from tests.running import LEARNED, weights
from tests.test_conformance import FAMILY_NAMES, LENGTHS, STEPS, latent_model
from tests.tiny_families import TINY, TOKENS, pixels

pytestmark = [
    pytest.mark.usefixtures("quiet_run"),
    pytest.mark.parametrize("family", FAMILY_NAMES, scope="module"),
]


@pytest.fixture
def quiet_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


@pytest.fixture(scope="module")
def saved(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / family
    with quiet():
        TINY[family]().save_pretrained(folder)
    return folder


def options(family: str, model: Path, out: Path, **more: object) -> list[str]:
    given = {
        "pretrained.model": model,
        "experiment.reward_fn": "brightness",
        "sampling.num_steps": STEPS,
        "sampling.height": pixels(family),
        "sampling.width": pixels(family),
        "sampling.max_sequence_length": TOKENS if LENGTHS[family] else 0,
        "sampling.guidance_scale": 3,
        "sampling.batch_size": 2,
        "sampling.num_batches_per_epoch": 1,
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.num_epochs": 2,
        "training.lr": 0.05,
        "model.lora_rank": 2,
        "model.flow_channel_width": "8,16",
        "model.unet_reg_scale": 0,
        "model.reward_scale": 100,
        "evaluation.num_prompts": 0,
        "logging.sample_freq": 0,
        "logging.save_freq": 1,
        "logging.tensorboard": False,
        "saving.output_dir": out,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return [f"--config.{key}={value}" for key, value in given.items()]


def train(family: str, model: Path, out: Path, **more: object) -> RunFolder:
    main(["train", *options(family, model, out, **more)])
    (folder,) = out.iterdir()
    return RunFolder(folder)


@pytest.fixture(scope="module")
def run(family: str, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(family, saved, tmp_path_factory.mktemp("runs"))


def test_two_updates_move_the_lora_and_are_finite(family: str, run: RunFolder) -> None:
    rows = run.metrics()
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    first, last = (weights(run.path, update, LEARNED) for update in (1, 2))
    assert all(bool(value.isfinite().all()) for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert run.config().pretrained.model and (run.path / "report.html").is_file()


def test_it_is_exported_in_every_form(family: str, run: RunFolder, tmp_path: Path) -> None:
    """Each is loaded afresh and draws the run's pictures, or the export fails."""
    main(["export", str(run.path), "--format=all", "--out", str(tmp_path / "out")])
    made = {folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir()}
    assert made == set(FAMILIES[family].export_forms)
    (file,) = (tmp_path / "out" / "diffusers").glob("*.safetensors")
    known = load_file(run.checkpoint("").joinpath("pytorch_lora_weights.safetensors"))
    state = load_file(file)
    assert state.keys() == known.keys()
    assert all(torch.equal(state[name], known[name]) for name in state)


def test_the_printed_program_draws_with_the_lora(family: str, run: RunFolder) -> None:
    config, drawn = run.config(), []
    for weights_of in (str(run.checkpoint("")), ""):
        program = how_to_load(config, "a cat", weights_of, times=run.times())
        if not weights_of:
            program = program.replace("pipe.load_lora_weights('')\n", "")
        names: dict[str, object] = {}
        torch.manual_seed(0)
        with quiet():
            exec(program, names)
        drawn.append(np.asarray(names["image"], dtype=float))
    assert drawn[0].shape == (pixels(family), pixels(family), 3)
    assert drawn[0].std() > 1 and np.abs(drawn[0] - drawn[1]).max() > 1


def test_it_is_counted_without_weights(family: str, saved: Path) -> None:
    """On the meta device, from the configurations beside the weights: what `plan` counts."""
    config = Config()
    for option in options(family, saved, saved):
        key, _, value = option.removeprefix("--config.").partition("=")
        set_option(config, key, value)
    with torch.device("meta"):
        policy = FAMILIES[family].skeleton(config)  # type: ignore[misc]
        given = policy.model.blank(4)
        x, time = torch.zeros(4, *policy.sample_shape), torch.zeros(4)
        found = policy.model.call(policy.network, x, time, given)
        assert policy.decode(x).shape == (4, 3, pixels(family), pixels(family))
    assert found.is_meta and found.shape == x.shape
    whole = latent_model(family)(TINY[family]())
    count = sum(p.numel() for p in policy.network.parameters() if not p.requires_grad)
    assert count == sum(p.numel() for p in whole.network.parameters())


@pytest.mark.conformance
def test_doctor_and_plan(family: str, saved: Path, tmp_path: Path, capsys) -> None:
    main(["doctor", *options(family, saved, tmp_path)])
    said = capsys.readouterr().out
    assert "gradient of size" in said and "failure" not in said.lower()
    main(["plan", *options(family, saved, tmp_path)])
    assert FAMILIES[family].network in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.conformance
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_makes_an_update(
    family: str, method: str, saved: Path, tmp_path: Path
) -> None:
    more: dict[str, object] = {"experiment__method": method}
    if "pool" in METHODS[method].sources and "paths" not in METHODS[method].sources:
        more |= {"pool__size": 4, "pool__images_per_prompt": 2}
    if METHODS[method].ode and FAMILIES[family].network == "U-Net":  # no flow model: one line
        with pytest.raises(SystemExit):
            train(family, saved, tmp_path, **more)
        return
    folder = train(family, saved, tmp_path, **more)
    assert all(np.isfinite(row["loss"]) for row in folder.metrics())
    first, last = (weights(folder.path, update, ("policy",)) for update in (1, 2))
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.conformance
def test_a_run_that_stopped_goes_on_as_if_nothing_had_been(
    family: str, saved: Path, run: RunFolder, tmp_path: Path
) -> None:
    part = train(family, saved, tmp_path, training__num_epochs=1)
    main(["train", *options(family, saved, tmp_path)])
    known, found = (weights(folder.path, 2) for folder in (run, part))
    assert all(torch.equal(known[name], found[name]) for name in known)
