"""The planner's time: passes counted against a run's, parts timed by a clock of FLOPs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nablagfn.cli import main
from nablagfn.commands import planner
from nablagfn.commands.planner import Passes, Seconds, measuring_passes, total
from nablagfn.config import Config, ConfigError
from nablagfn.core.counting import Counts, counted
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import resolve
from nablagfn.training.trainer import Trainer
from tests.test_planner import config_of
from tests.test_trainer import small_config
from tests.tiny_pipeline import make_pipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "flow"),
    [
        ({}, 12),
        ({"model.reverse_loss_scale": 0.0}, 6),
        ({"model.no_flow": True}, 0),
        ({"experiment.method": "ddpo"}, 0),
    ],
)
def test_the_flow_network_sees_both_ends_of_a_transition_if_the_reverse_loss_is_on(
    options: dict[str, object], flow: int, tmp_path: Path
) -> None:
    """Of a path with 6 transitions."""
    shape = {"sampling.num_steps": 50, "model.timestep_fraction": 0.1}
    work = planner.work_of(small_config(tmp_path, **shape, **options))
    assert (work.flow, work.flow_backward) == (flow, flow)


def test_a_sum_by_hand() -> None:
    passes = {"U-Net": Passes(3, 2), "decoder": Passes(5)}
    prices = {"U-Net": Seconds(1.0, 10.0), "decoder": Seconds(100.0, 1e9), "reward": Seconds(7, 7)}
    assert total(passes, prices) == 3 + 20 + 500


@pytest.mark.parametrize(("sample_freq", "eval_freq"), [(2, 0), (3, 2)])
def test_measuring_is_what_a_run_draws_beside_its_updates(
    sample_freq: int, eval_freq: int, tmp_path: Path
) -> None:
    """Three epochs of one update: probes at their end and where they are due, before and after."""
    config = small_config(
        tmp_path,
        **{
            "training.num_epochs": 3,
            "sampling.num_batches_per_epoch": 1,
            "experiment.reward_fn": "brightness",
            "logging.sample_freq": sample_freq,
            "logging.eval_freq": eval_freq,
            "logging.num_samples": 4,
            "evaluation.num_prompts": 2,
            "evaluation.images_per_prompt": 3,
        },
    )
    counts = Counts()
    policy = counted(StableDiffusionPolicy(make_pipeline()), counts)
    reward, prompts = resolve("brightness", CPU), PromptSet(("a cat", "a dog", "an ant"))
    trainer = Trainer(policy, reward, prompts, config, show_progress=False)
    trainer.fit()
    rows = trainer.folder.metrics()
    found = measuring_passes(config)
    assert found["drawing"].forward == counts.model - sum(row["model_evals"] for row in rows)
    scored = 3 * 2  # each path's end, once
    learned = sum(row["decode_evals"] for row in rows)
    assert found["decoder"].forward == counts.decode - learned - scored


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_part_is_timed_forward_and_back(
    checkpointing: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    """On real tensors, by a clock that shows FLOPs: what was counted on the meta device."""
    options = {
        "training.gradient_checkpointing": checkpointing,
        "training.micro_batch": 3,
        "training.vae_slice": 2,
    }
    config = config_of(tiny_folder, tmp_path, "nabla-db", **options)
    found = planner.predict(config, CPU)
    assert found.prices["U-Net"].backward > 0 and found.prices["drawing"].backward == 0
    before = torch.get_rng_state()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        timed = planner.timed(config, CPU, found, lambda: float(counter.get_total_flops()))
    assert torch.equal(torch.get_rng_state(), before)
    assert timed.keys() == found.prices.keys()
    for part, price in found.prices.items():
        assert timed[part].forward == pytest.approx(price.forward, rel=0.02), part
        # attention that keeps no table computes its products again on the way back
        assert timed[part].backward == pytest.approx(price.backward, rel=0.1), part


def test_as_many_rows_at_a_time_as_the_run_takes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"training.micro_batch": 3, "training.vae_slice": 2, "sampling.batch_size": 8}
    config = config_of(tiny_folder, tmp_path, "nabla-db", **options)
    found = planner.predict(config, CPU)
    seen: dict[str, int] = {}
    for name in ("eps", "decode", "score", "guess"):
        true = getattr(planner.parts.Subject, name)

        def spy(self: object, rows: int, gradient: bool, name: str = name, true=true) -> object:
            seen[f"{name} {gradient}"] = rows
            return true(self, rows, gradient)

        monkeypatch.setattr(planner.parts.Subject, name, spy)
    planner.timed(config, CPU, found)
    wanted = {"eps False": 8, "eps True": 3, "decode True": 2, "score True": 2, "guess True": 3}
    assert seen == wanted


def test_a_black_box_is_timed_though_it_has_no_flops(tiny_folder: Path, tmp_path: Path) -> None:
    options = {"experiment.reward_fn": "jpeg-size"}
    config = config_of(tiny_folder, tmp_path, "ddpo", **options)
    found = planner.predict(config, CPU)
    assert found.prices["reward"].forward == 0
    ticks = iter(range(10**6))
    assert planner.timed(config, CPU, found, lambda: next(ticks))["reward"].forward > 0


def test_a_rate_is_a_speed_and_too_slow_a_one_is_not_waited_for(
    tiny_folder: Path, tmp_path: Path
) -> None:
    found = planner.predict(config_of(tiny_folder, tmp_path, "nabla-db"), CPU)
    assert not planner.too_long(found, rate=1e9)
    assert planner.too_long(found, rate=1e4)
    prices = planner.at_rate(found.prices, 5e9)
    assert total(found.passes, prices) == pytest.approx(found.flops / 5e9)
    assert 1e8 < planner.matmul_rate(CPU, torch.float32, 0.0) < 1e14


@pytest.mark.parametrize(("text", "rate"), [("60", 60e12), ("0.5", 5e11), ("312 tflop/s", 312e12)])
def test_rates_are_read(text: str, rate: float) -> None:
    assert planner.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["0", "-1", "fast", "60 GFLOP/s", ""])
def test_other_rates_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        planner.parse_rate(text)


@pytest.mark.parametrize("options", [["--memory=8GB"], ["--memory=8GB", "--rate=0.001"], []])
def test_the_command_says_how_long_or_how_to_know(
    options: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [f"--config.pretrained.model={tiny_folder}", "--config.model.flow_channel_width=8,16"]
    main(["plan", "--config.experiment.reward_fn=brightness", *model, *options])
    text = " ".join(capsys.readouterr().out.split())
    if options == ["--memory=8GB"]:
        assert "--rate=TFLOP/S" in text and "one update:" not in text
        return
    assert "one update: " in text and "the run: 200 updates, " in text
    if options:
        flops = planner.predict(_config(tiny_folder), torch.device("cuda")).flops
        seconds = float(text.partition("one update: ")[2].split()[0])
        assert math.isclose(seconds, flops / 1e9, rel_tol=0.06)  # two digits are printed


def _config(folder: Path) -> Config:
    config = Config()
    config.pretrained.model = str(folder)
    config.model.flow_channel_width = (8, 16)
    config.experiment.reward_fn = "brightness"
    return config
