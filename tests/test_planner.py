"""The memory planner against what an update really holds, counted storage by storage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._device import _device_constructors

from nablagfn.cli import main
from nablagfn.commands import planner
from nablagfn.commands.planner import Costs, Setting
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.models.architectures import random_sd15
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import resolve
from nablagfn.runtime.costs import Tracker, cost, tensors_of
from nablagfn.training.trainer import Trainer
from tests.test_trainer import small_config
from tests.tiny_pipeline import make_pipeline

CPU = torch.device("cpu")


def config_of(folder: Path, out: Path, method: str, **options: object) -> Config:
    return small_config(
        out,
        **{
            "pretrained.model": str(folder),
            "experiment.reward_fn": "colourfulness",
            "experiment.method": method,
            "method.draft_steps": 2,
            "training.batch_size": 4,
            **options,
        },
    )


def held_by_update(config: Config, rows: int) -> float:
    """Peak bytes of all that an update makes, on real tensors."""
    policy = StableDiffusionPolicy(
        make_pipeline(),
        guidance_scale=config.sampling.guidance_scale,
        gradient_checkpointing=config.training.gradient_checkpointing,
        vae_slice=config.training.vae_slice,
        name=config.pretrained.model,
    )
    reward = resolve("colourfulness", CPU)
    trainer = Trainer(policy, reward, PromptSet(("a cat",)), config, show_progress=False)
    drawn = replace(trainer.collector.collect(0), reward=torch.zeros(4))
    trainer.objective.observe(drawn.condition.prompts, drawn.reward)
    (chosen, *_) = trainer.collector.batches(drawn, 0, 0, trainer.objective)
    modules = [policy.network, policy.vae, policy.pipeline.text_encoder, trainer.objective.modules]
    with Tracker([*tensors_of(modules), chosen.paths.x, chosen.paths.output]) as tracker:
        trainer.updater.accumulate(chosen, rows)
    return tracker.peak


@pytest.fixture(scope="module")
def parts(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Costs:
    config = config_of(tiny_folder, tmp_path_factory.mktemp("out"), "nabla-db")
    return planner.measure(config, CPU)


def test_counting_does_not_lean_on_the_context_for_linspace(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers patches torch.linspace while it loads; a first look at torch's constructors in
    that moment makes a device context forget it."""
    _device_constructors.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "linspace", lambda *a, **o: None)
        _device_constructors()
    try:
        with torch.device("meta"):
            assert torch.linspace(0, 1, 2).device.type == "cpu"  # forgotten
        found = planner.measure(config_of(tiny_folder, tmp_path, "nabla-db"), CPU)
    finally:
        _device_constructors.cache_clear()
    assert found.eps.held > 0


CASES = [
    ("nabla-db", {}),
    ("nabla-db", {"training.gradient_checkpointing": True, "training.vae_slice": 1}),
    ("nabla-db-lambda", {}),
    ("nabla-db-lambda", {"method.guess_model": "finetuned"}),
    ("nabla-db-lambda", {"method.window": 4, "method.return_lambda": 0.9}),
    ("nabla-db-lambda", {"method.window": 4, "method.guess_model": "finetuned"}),
    ("adjoint-matching", {}),
    ("draft-k", {}),
    ("ddpo", {"training.gradient_checkpointing": True}),
    ("nabla-db-pool", {"pool.size": 8, "pool.images_per_prompt": 4}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_the_prediction_covers_what_an_update_holds(
    method: str, options: dict[str, object], tiny_folder: Path, tmp_path: Path, parts: Costs
) -> None:
    """Of two sizes, the difference: what rows add, which is what the planner decides by."""
    config = config_of(tiny_folder, tmp_path, method, **options)
    work = planner.work_of(config)

    def predicted(rows: int) -> float:
        setting = replace(planner.setting_of(config), micro_batch=rows)
        found = planner.moments(config, parts, work, setting)
        return max(value for name, value in found.items() if name.startswith("update"))

    true = held_by_update(config, 4) - held_by_update(config, 2)
    assert 0.95 * true <= predicted(4) - predicted(2) <= 2.2 * true


def test_a_matrix_product_by_hand() -> None:
    """y = xw: kept is y; forward 2·4·8·16 FLOPs, and as many back to w."""
    x, w = torch.zeros(4, 8), torch.zeros(8, 16, requires_grad=True)
    found = cost(lambda: x @ w, [x, w])
    assert found.held == 4 * 16 * 4
    assert found.forward == found.backward == 2 * 4 * 8 * 16
    assert found.peak == found.held + (4 * 16 + 8 * 16) * 4  # and the gradients of y and of w


def test_attention_is_counted_as_kernels_keep_it_not_as_a_table() -> None:
    length, width = 1024, 64
    with torch.device("meta"):
        q, k, v = (torch.zeros(1, 1, length, width, requires_grad=True) for _ in range(3))
        found = cost(lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v])
    assert length * width * 4 <= found.held < 2 * length * width * 4  # not length²
    assert found.forward == 2 * 2 * length**2 * width


def test_stable_diffusion_by_its_published_size() -> None:
    with torch.device("meta"):
        pipeline = random_sd15()
    count = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters())
        for name in ("unet", "vae", "text_encoder")
    }
    assert count == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def test_work_is_what_the_methods_page_says() -> None:
    """docs/methods.md: a path of N steps is drawn, and learning from n of them costs ..."""
    config = Config()
    config.model.no_flow = True
    work, n = planner.work_of(config), 6
    assert work.transitions == n
    assert work.eps + work.eps_backward - config.sampling.num_steps == 5 * n - 2
    assert (work.decode, work.decode_backward) == (n + 1, n)


def test_a_pool_is_drawn_once_and_shared_by_all_updates() -> None:
    """500 paths of 50 steps for 2,000 uses, and back along each; 2 decodes less an update."""
    config = Config()
    for key, value in {
        "experiment.method": "nabla-db-pool",
        "pool.size": 500,
        "pool.images_per_prompt": 10,
        "training.num_epochs": 125,
        "sampling.batch_size": 16,
        "sampling.num_batches_per_epoch": 1,
        "training.batch_size": 16,
        "training.gradient_accumulation_steps": 1,
    }.items():
        set_option(config, key, value)
    work = planner.work_of(config)
    assert work.transitions == 5
    assert work.eps + work.eps_backward == (50 + 50 + 49) * 500 / 2000 + 2 * 5
    assert (work.decode, work.decode_backward) == (0.25, 0.25)
    assert planner.update_passes(config, work)["drawing"].forward == 16 * 50 * 500 / 2000
    set_option(config, "pool.own_share", 0.5)
    set_option(config, "pool.refresh", 31)  # at the epochs 31, 62, 93 and 124
    own = planner.work_of(config)
    assert own.eps - work.eps == 4 * 250 * 3 * 50 / 2000
    set_option(config, "pool.own_share", 0.0)
    set_option(config, "experiment.method", "terminal-gradient")
    set_option(config, "training.source", "pool")
    set_option(config, "model.unet_reg_scale", 0.0)
    assert planner.work_of(config).decode_backward == 1, "its own, and nothing of the pool"
    set_option(config, "training.source", "auto")
    set_option(config, "experiment.method", "reward-weighted")
    assert planner.work_of(config).decode_backward == 0
    set_option(config, "pool.looks", 6)
    assert planner.work_of(config).decode == 7 * 0.25


def test_less_memory_means_smaller_parts_of_the_same_update(
    tiny_folder: Path, tmp_path: Path, parts: Costs
) -> None:
    """Down to nothing that fits; what is chosen fits, and keeps the number of paths drawn."""
    config = config_of(tiny_folder, tmp_path, "nabla-db", **{"sampling.batch_size": 8})
    work = planner.work_of(config)
    much = planner.choose(config, parts, work, 1e12)
    assert much.setting == Setting(12, False, 0, 8)
    assert much.options(config) == {"training.micro_batch": 12}
    least = sum(much.fixed.values())
    middle = planner.choose(config, parts, work, least + (much.peak - least) / 4)
    assert middle.setting is not None and middle.peak <= middle.usable
    assert middle.setting.micro_batch < 12 and 8 % middle.setting.sampling_batch == 0
    drawn = {"sampling.batch_size": 8, "sampling.num_batches_per_epoch": 2}
    drawn |= middle.options(config)
    assert drawn["sampling.batch_size"] * drawn["sampling.num_batches_per_epoch"] == 16
    none = planner.choose(config, parts, work, least)
    assert none.setting is None and none.options(config) == {}


def test_checkpointing_comes_after_slices_and_only_for_enough_rows(
    tiny_folder: Path, tmp_path: Path, parts: Costs
) -> None:
    """At each amount of memory, what adds no work is tried first."""
    config = config_of(tiny_folder, tmp_path, "nabla-db")
    work = planner.work_of(config)
    fixed = sum(parts.fixed.values())
    plain = planner.setting_of(config)
    ways = [
        replace(plain, micro_batch=4),
        replace(plain, micro_batch=4, vae_slice=1),
        replace(plain, micro_batch=4, vae_slice=1, gradient_checkpointing=True),
    ]
    need = [fixed + max(planner.moments(config, parts, work, way).values()) for way in ways]
    assert need[0] > need[1] > need[2]
    for way, memory in zip(ways, need, strict=True):
        chosen = planner.choose(config, parts, work, 1.0001 * memory).setting
        assert chosen is not None and chosen.micro_batch >= 4
        assert (chosen.vae_slice, chosen.gradient_checkpointing) == (
            way.vae_slice,
            way.gradient_checkpointing,
        )


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("8 GiB", 2.0**33), ("0.5", 5e8)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert planner.parse_memory(text) == size


@pytest.mark.parametrize("text", ["0GB", "-1GB", "much", "24 TB", ""])
def test_other_sizes_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        planner.parse_memory(text)


@pytest.mark.parametrize("memory", ["2GB", "601MB"])
def test_the_command_prints_the_options_or_ends_with_1(
    memory: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 32 paths with 6 transitions; 0.6 GB is the context of a GPU."""
    options = [f"--config.pretrained.model={tiny_folder}", "--config.model.flow_channel_width=8,16"]
    command = ["plan", f"--memory={memory}", "--config.experiment.reward_fn=brightness", *options]
    if memory == "2GB":
        main(command)
        assert "fits with: --config.training.micro_batch=192\n" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 1 and "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "options", "built"),
    [
        ("nabla-db", {}, True),
        ("nabla-db", {"model.no_flow": True}, False),
        ("nabla-db-lambda", {}, True),
        ("nabla-db-lambda", {"method.return_lambda": 1.0}, False),
        ("nabla-db-lambda", {"method.return_lambda": 1.0, "method.window": 2}, True),
        ("dag-db", {"model.no_flow": True}, True),
        ("adjoint-matching", {}, False),
    ],
)
def test_a_flow_network_is_counted_where_one_is_built(
    method: str, options: dict[str, object], built: bool, tmp_path: Path, tiny_folder: Path
) -> None:
    """In the fixed bytes, and in the objective that is trained."""
    chosen = {"experiment.method": method, "pretrained.model": str(tiny_folder), **options}
    config = small_config(tmp_path, **{"experiment.reward_fn": "colourfulness"}, **chosen)
    fixed = planner.predict(config, torch.device("cpu")).fixed
    assert (fixed["flow network and its optimizer"] > 0) == built
    policy = StableDiffusionPolicy(make_pipeline())
    reward = resolve("colourfulness", torch.device("cpu"))
    trainer = Trainer(policy, reward, PromptSet(("a cat",)), config, show_progress=False)
    assert ("flow" in trainer.objective.modules) == built
