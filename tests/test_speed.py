"""The fast paths against the plain ones: the same losses and gradients, less memory, no waiting."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nablagfn.config import Config, ConfigError
from nablagfn.core import kernels, rng
from nablagfn.core.log_reward import LogReward
from nablagfn.core.rollout import replay, rollout
from nablagfn.core.types import Metadata, Policy, Selection
from nablagfn.methods.estimators.guess import Guess
from nablagfn.methods.estimators.nabla_db_lambda import NablaDBLambda
from nablagfn.methods.estimators.residual_db import ResidualDB
from nablagfn.methods.objectives.matching import MatchingObjective
from nablagfn.methods.registry import METHODS
from nablagfn.models.guess_decoder import GuessDecoder, load_guess_decoder
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.models.tune import tune
from nablagfn.prompts import PromptSet
from nablagfn.rewards import analytic, modules_of, resolve
from nablagfn.training.trainer import Trainer
from tests.live_graph import LiveGraph
from tests.tables import table_of
from tests.test_rivals import KINDS, method_config
from tests.tiny_pipeline import make_pipeline
from tests.tiny_rewards import save_weights
from tests.worlds import randomise

pytestmark = pytest.mark.usefixtures("no_report")

PROMPTS = ("a cat", "a dog", "an ant")
STEPS = 3
BETA = 50.0


def make_policy(dtype: torch.dtype = torch.float64, **options: object) -> StableDiffusionPolicy:
    pipeline = make_pipeline().to(dtype)
    policy = StableDiffusionPolicy(pipeline, **{"guidance_scale": 3.0, "lora_rank": 2, **options})
    randomise(policy.parameters(), 0.1)
    return policy


def draw(
    policy: Policy, dtype: torch.dtype = torch.float64
) -> tuple[kernels.KernelTable, Selection]:
    """Every transition of three paths."""
    table = table_of(policy, STEPS)
    rows = range(len(PROMPTS))
    shape = (STEPS + 1, *policy.sample_shape)
    noise = rng.normal(shape, rows, seed=0, purpose="noise", dtype=dtype)
    drawn = rollout(policy, table, noise, policy.condition(PROMPTS))
    row = torch.arange(len(PROMPTS)).repeat_interleave(STEPS)
    return table, Selection(drawn, row, torch.arange(STEPS).repeat(len(PROMPTS)))


def objective_for(
    policy: StableDiffusionPolicy, table: kernels.KernelTable, *, flow: bool = True, piece: int = 0
) -> MatchingObjective:
    log_reward = LogReward(policy, analytic.colourfulness, BETA, piece=piece)
    if not flow:
        return MatchingObjective(policy, table, Guess(policy, log_reward, "squared"))
    network = policy.make_flow((8, 16), 1, seed=0).to(policy.dtype)
    return MatchingObjective(policy, table, ResidualDB(policy, log_reward, "squared", network))


# -------------------------------------------------------------------------------- memory


def peak_of_losses(objective: MatchingObjective, chosen: Selection) -> int:
    with LiveGraph() as graph:
        objective.losses(chosen.transitions()).total().sum().backward()
    return graph.peak


def test_the_count_of_live_bytes_rises_and_falls() -> None:
    with LiveGraph() as graph:
        x = torch.ones(10, requires_grad=True)
        y = x.exp()  # saves its result, 40 bytes
        z = y.square()  # saves y again
        assert graph.now == 40
        z.sum().backward()
        del y, z
    assert (graph.now, graph.peak) == (0, 40)


@pytest.mark.parametrize("flow", [True, False])
def test_graphs_of_the_model_do_not_pile_up(flow: bool) -> None:
    """The most that is held at once is one graph of the U-Net, of the VAE and of the flow."""
    policy = make_policy()
    table, chosen = draw(policy)
    batch = chosen.transitions()
    k = table.at(batch.step, batch.x)
    parts = []
    x = batch.x.clone().requires_grad_(flow)
    with LiveGraph() as unet:
        eps = policy.output(x, k.here.time, batch.condition)
        parts.append(unet.peak)
    with LiveGraph() as vae:
        log_reward = LogReward(policy, analytic.colourfulness, BETA)
        log_reward(batch.x.clone().requires_grad_(), batch.condition)
        parts.append(vae.peak)
    objective = objective_for(policy, table, flow=flow)
    for network in objective.modules.values():
        with LiveGraph() as own:
            kept = [network(batch.x, k.here.time, batch.condition) for _ in range(2)]
            parts.append(own.peak)
            del kept
    del eps
    assert peak_of_losses(objective, chosen) < 1.1 * sum(parts)
    assert parts[0] > 0.2 * sum(parts)  # a second graph of the U-Net would be seen


def test_nothing_is_held_when_theta_is_evaluated() -> None:
    """∇-DB(λ) with scattered transitions, too, has finished with the frozen model by then."""
    policy = make_policy()
    table, chosen = draw(policy)
    log_reward = LogReward(policy, analytic.colourfulness, BETA)
    network = policy.make_flow((8, 16), 1, seed=0, hint=True).to(policy.dtype)
    settings = {"lam": 0.0, "weight": "std", "frozen_guess": True, "hint": True, "chunk": 4}
    estimator = NablaDBLambda(policy, log_reward, table, "squared", network, **settings)
    held: list[int] = []
    with LiveGraph() as graph:

        def spy(x: Tensor, timestep: Tensor, condition: object) -> Tensor:
            held.append(graph.now)
            return StableDiffusionPolicy.output(policy, x, timestep, condition)

        policy.output = spy  # type: ignore[method-assign]
        MatchingObjective(policy, table, estimator).losses(chosen.transitions())
    frozen, guess, theta = held
    assert frozen == theta == 0 < guess  # at x_k, at x_{k+1}, at x_k


def test_the_guess_keeps_nothing_for_theta() -> None:
    """And θ is trained again after it, also where an error leaves it."""
    policy = make_policy()
    table, chosen = draw(policy)
    objective = objective_for(policy, table, flow=False)
    batch = chosen.transitions()
    seen: list[bool] = []

    def spy(x: Tensor, timestep: Tensor, condition: object) -> Tensor:
        seen.append(any(p.requires_grad for p in policy.parameters()))
        return StableDiffusionPolicy.output(policy, x, timestep, condition)

    policy.output = spy  # type: ignore[method-assign]
    objective.losses(batch)
    assert seen == [False, False, True]  # frozen, guess, θ
    assert all(p.requires_grad for p in policy.parameters())

    def broken(x: Tensor, timestep: Tensor, condition: object) -> Tensor:
        raise RuntimeError

    policy.output = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        objective.estimator.ahead(batch, table.at(batch.step, batch.x), batch.x, batch.x)
    assert all(p.requires_grad for p in policy.parameters())


def test_without_its_reverse_loss_the_reverse_condition_costs_nothing(tmp_path: Path) -> None:
    """As the guess alone: the costs of docs/methods.md; the same numbers as with a tiny weight."""
    found = []
    for scale in (0.0, 1e-30):
        options = {"model.reverse_loss_scale": scale, "training.num_epochs": 1}
        trainer = KINDS[0].trainer(method_config("nabla-db", tmp_path / str(scale), **options))
        trainer.fit()
        (row,) = trainer.folder.metrics()
        found.append((row, trainer.policy.state_dict()))
    (none, theta), (tiny, same) = found
    assert all(torch.equal(theta[name], same[name]) for name in theta)
    assert none["loss_reverse"] == 0 and tiny["loss_reverse"] > 0
    assert none["loss"] == tiny["loss"] and none["flow_sq"] == tiny["flow_sq"]
    assert none["model_evals"] < tiny["model_evals"]


# -------------------------------------------------------------------------------- decoding


def gradients_of(objective: MatchingObjective, chosen: Selection) -> list[Tensor]:
    """The losses of every transition, and the gradients of θ and φ."""
    losses = objective.losses(chosen.transitions()).total()
    learned = [*objective.policy.parameters(), *objective.modules.parameters()]
    return [losses.detach(), *torch.autograd.grad(losses.sum(), learned, allow_unused=True)]


def close(ones: list[Tensor], others: list[Tensor], **bounds: float) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, **(bounds or {"rtol": 1e-9, "atol": 1e-9}))


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("how", ["slices", "checkpointing", "both"])
def test_decoding_with_less_memory_changes_nothing_else(how: str, flow: bool) -> None:
    found, peaks = [], []
    for saving in (False, True):
        slices, checkpointing = saving and how != "checkpointing", saving and how != "slices"
        policy = make_policy(vae_checkpointing=checkpointing)
        table, chosen = draw(policy)
        objective = objective_for(policy, table, flow=flow, piece=2 if slices else 0)
        found.append(gradients_of(objective, chosen))
        log_reward = objective.estimator.log_reward
        with LiveGraph() as graph:
            x = chosen.paths.clean[torch.tensor([0, 1, 2, 0])].requires_grad_()
            log_reward(x, chosen.paths.condition[torch.tensor([0, 1, 2, 0])]).sum().backward()
        peaks.append(graph.peak)
    close(*found)
    assert max(float(g.abs().max()) for g in found[0]) > 1e-3
    assert peaks[1] < {"slices": 0.55, "checkpointing": 0.8, "both": 0.45}[how] * peaks[0]


def test_pictures_are_decoded_in_slices_where_no_gradient_is_taken() -> None:
    policy, sliced = make_policy(), make_policy(vae_slice=2)
    x = torch.randn(5, *policy.sample_shape, dtype=torch.float64)
    sizes: list[int] = []
    decode = sliced.vae.decode
    sliced.vae.decode = lambda z, **options: (sizes.append(len(z)), decode(z, **options))[1]
    with torch.no_grad():
        torch.testing.assert_close(sliced.decode(x), policy.decode(x), rtol=1e-12, atol=1e-12)
    assert sizes == [2, 2, 1]


# -------------------------------------------------------------------------------- a small decoder


@pytest.fixture(scope="module")
def small_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a narrow AutoencoderTiny with random weights, twice the latent's size."""
    return save_decoder(tmp_path_factory.mktemp("tiny-decoder"), channels=4)


def save_decoder(folder: Path, channels: int) -> Path:
    torch.manual_seed(0)
    AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder)
    return folder


def test_the_small_decoder_sees_predicted_samples_and_the_vae_finished_ones(
    small_decoder: Path,
) -> None:
    """The guess row by row: mixed rows, only noisy rows, only clean rows."""
    policy = make_policy(torch.float32, guidance_scale=1.0)
    decoder = load_guess_decoder(str(small_decoder), policy, torch.float32)
    table, chosen = draw(policy, torch.float32)
    batch = chosen.transitions()
    exact = LogReward(policy, analytic.colourfulness, BETA)
    log_reward = replace(exact, decoder=decoder)
    for rows in (range(len(batch)), (0, 3), (2, 5)):
        part = batch[torch.tensor(list(rows))]
        k = table.at(part.step, part.x)
        x_clean = part.x.clone().requires_grad_()
        value = log_reward.at_next(x_clean, k, part.condition)
        (found,) = torch.autograd.grad(value.sum(), x_clean)
        for i, step in enumerate(part.step.tolist()):
            decode = policy.decode if step == STEPS - 1 else by_hand(decoder)
            x = part.x[i : i + 1].clone().requires_grad_()
            known = BETA * analytic.colourfulness(decode(x), ["a"], [{}])[0]
            torch.testing.assert_close(value[i], known, rtol=1e-4, atol=1e-4)
            (slope,) = torch.autograd.grad(known, x)
            torch.testing.assert_close(found[i : i + 1], slope, rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in decoder.vae.parameters())


def by_hand(decoder: GuessDecoder) -> Callable[[Tensor], Tensor]:
    """AutoencoderTiny's pictures in [0, 1] of latents scaled as the model's samples are."""
    return lambda x: (decoder.vae.decoder(x) + 1) / 2


def decoded_by(name: str, method: str, out: Path) -> Config:
    options = {"model.guess_decoder": name, "training.num_epochs": 1, "model.reward_scale": 1e3}
    return method_config(method, out, **options)


GUESSES = [name for name, known in METHODS.items() if known.guesses and not known.ode]


@pytest.mark.parametrize("method", GUESSES)
def test_a_small_decoder_changes_the_methods_that_guess(
    method: str, small_decoder: Path, tmp_path: Path
) -> None:
    metrics = []
    for name in ("", str(small_decoder)):
        trainer = KINDS[1].trainer(decoded_by(name, method, tmp_path / str(bool(name))))
        trainer.fit()
        metrics.append(trainer.folder.metrics()[0])
    plain, small = metrics
    assert small["reward"] == plain["reward"]  # what is reported is seen through the VAE
    assert small["loss"] != pytest.approx(plain["loss"], rel=1e-3)
    assert small["decode_evals"] < plain["decode_evals"]


def test_methods_that_guess_nothing_refuse_a_small_decoder(
    small_decoder: Path, tmp_path: Path
) -> None:
    for method in (name for name, known in METHODS.items() if not known.guesses):
        with pytest.raises(ConfigError, match="guess_decoder"):
            KINDS[1].trainer(decoded_by(str(small_decoder), method, tmp_path))


@pytest.mark.parametrize("wrong", ["missing", "channels", "world"])
def test_a_small_decoder_that_does_not_fit_gives_one_line(
    wrong: str, small_decoder: Path, tmp_path: Path
) -> None:
    name = str(small_decoder)
    if wrong == "missing":
        name = str(tmp_path / "nothing")
    elif wrong == "channels":
        name = str(save_decoder(tmp_path / "other", channels=5))
    config = method_config("nabla-db", tmp_path / "run", **{"model.guess_decoder": name})
    with pytest.raises(ConfigError) as caught:
        KINDS[0 if wrong == "world" else 1].trainer(config)
    assert "config.model.guess_decoder=" in str(caught.value)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- waiting


class Copies(TorchDispatchMode):
    """Counts copies between devices, and those that wait. On `meta`, reading a value back is an
    error by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            target = kwargs.get("device")
            moved = target is not None and torch.device(target) != args[0].device
            self.count += moved
            self.waits += moved and not kwargs.get("non_blocking", False)
        return func(*args, **kwargs)


@contextmanager
def on_meta(policy: StableDiffusionPolicy) -> Iterator[StableDiffusionPolicy]:
    """The policy on a device that computes nothing and whose values cannot be read."""
    policy.condition(PROMPTS)  # encoded before
    empty = policy._negative()
    policy.network.to("meta")
    policy.vae.to("meta")
    policy._empty = {name: value.to("meta") for name, value in empty.items()}
    yield policy


def test_sampling_waits_for_nothing_and_copies_only_its_noise() -> None:
    with on_meta(make_policy(torch.float32)) as policy:
        table = table_of(policy, STEPS)
        noise = torch.randn(len(PROMPTS), STEPS + 1, *policy.sample_shape)
        where = policy.condition(PROMPTS)
        rollout(policy, table, noise, where)  # the table and the empty prompt go to the device
        with Copies() as copies:
            drawn = rollout(policy, table, noise, where)
        assert drawn.x.device.type == "meta" and copies.count == 1


@pytest.mark.parametrize("flow", [True, False])
def test_a_micro_batch_waits_for_nothing(flow: bool) -> None:
    """Mixed rows: some lead to the clean end. Only indices go to the device, once for each use."""
    with on_meta(make_policy(torch.float32)) as policy:
        table, chosen = draw(policy, torch.float32)
        objective = objective_for(policy, table, flow=flow)
        batch = chosen.transitions()
        objective.losses(batch[torch.arange(2, 7)])
        with Copies() as copies:
            losses = objective.losses(batch[torch.arange(2, 7)])
            losses.total().sum().backward(inputs=policy.parameters())
        assert losses.total().device.type == "meta" and copies.waits == 0
        assert copies.count == 5  # rows for x and for prompts; steps; noisy rows, twice


@pytest.fixture(scope="module")
def reward_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Narrow rewards of the true architectures."""
    return str(save_weights(tmp_path_factory.mktemp("weights") / "narrow"))


@pytest.mark.parametrize(
    "name", ["brightness", "tiny-aesthetic", "tiny-alignment", "aesthetic", "hpsv2"]
)  # in ImageReward's text encoder transformers asks whether the masks are all ones
def test_scoring_waits_for_nothing(
    name: str, reward_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that were seen before. `new_tensor` copies from the CPU, and waits unseen."""
    reward = resolve(name, torch.device("cpu"), reward_weights)
    prompts, metadata = ["a cat", "an ant"], [{}, {}]
    with torch.no_grad():
        reward(torch.rand(2, 3, 64, 64), prompts, metadata)
    for module in modules_of(reward):
        module.to("meta")
    monkeypatch.setattr(Tensor, "new_tensor", None)
    x = torch.rand(2, 3, 64, 64, device="meta").requires_grad_()
    with Copies() as copies:
        value = reward(x, prompts, metadata)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.device.type == "meta" and copies.waits == 0


def test_walking_a_path_again_waits_for_nothing() -> None:
    with on_meta(make_policy(torch.float32)) as policy:
        table, chosen = draw(policy, torch.float32)
        batch = replace(chosen, row=torch.tensor([0, 1, 2]), step=torch.tensor([1, 0, 2]))
        there = batch.transitions()
        noise = torch.randn(3, STEPS, *policy.sample_shape, device="meta")
        found = replay(policy, table, there.x, there.step, noise, there.condition)
        assert found.device.type == "meta" and found.shape == there.x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_are_the_table_s(dtype: torch.dtype) -> None:
    policy = make_policy()
    table = table_of(policy, 5, "dpm-solver")
    step = torch.tensor([4, 0, 2, 4])
    k = table.at(step, torch.zeros(4, 1, 1, dtype=dtype))
    for name in ("c1", "c2", "std"):
        known = getattr(table, name)[step].to(dtype)[:, None, None]
        assert torch.equal(getattr(k, name), known), name
    level = table.schedule.alpha_bar.to(dtype)
    assert torch.equal(k.here.alpha_bar, level[step][:, None, None])
    assert torch.equal(k.next.alpha_bar, level[step + 1][:, None, None])
    assert torch.equal(k.here.time, table.time[step].to(dtype))
    assert torch.equal(k.next.time, table.time[step + 1].to(dtype))
    assert k.last.tolist() == [True, False, False, True] and k.noisy.tolist() == [1, 2]
    for step_of_all, noisy in ((4, []), (1, [0, 1, 2])):
        assert table.at_step(step_of_all, torch.zeros(3, 1)).noisy.tolist() == noisy


# -------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("method", METHODS)
def test_every_split_gives_the_same_update(method: str, tmp_path: Path) -> None:
    """Transitions of several steps in a pass, 1, 3 or all; pictures decoded 1, 2 or all at a time:
    the same gradients and metrics."""
    found = []
    for size, pictures in ((1, 0), (3, 0), (100, 0), (100, 2), (3, 1)):
        options = {"training.micro_batch": size, "training.vae_slice": pictures}
        config = method_config(method, tmp_path / f"{size} {pictures}", **options)
        config.sampling.num_steps = 5
        trainer = KINDS[0].trainer(config)
        randomise(trainer.policy.parameters(), 0.1)
        randomise([p for p in trainer.objective.modules.parameters()], 0.1, seed=3)
        drawn = trainer.collector.collect(0)
        drawn = replace(
            drawn,
            x=drawn.x.double(),
            output=drawn.output.double(),
            reward=trainer._scores(drawn).total,
        )
        trainer._observe(drawn)
        (chosen,) = trainer.collector.batches(drawn, 0, 0, trainer.objective)
        metrics = trainer.updater.update(chosen).metrics
        own = trainer.objective.modules.parameters()
        learned = [*trainer.policy.parameters(), *(p for p in own if p.requires_grad)]
        found.append((metrics, [p.grad for p in learned]))
    (metrics, gradients), *others = found
    assert max(float(g.abs().max()) for g in gradients) > 1e-3
    for other, theirs in others:
        assert other == pytest.approx(metrics, rel=1e-6, abs=1e-9)  # metrics travel in float32
        for one, two in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12 * float(one.abs().max()))


# -------------------------------------------------------------------------------- switches


def trained(out: Path, **options: object) -> tuple[Trainer, dict[str, Tensor]]:
    """Two updates of nabla-db on the random pipeline, set up as `assemble` does."""
    config = method_config("nabla-db", out, **{"model.reward_scale": 1e3, **options})
    config.sampling.guidance_scale = 3.0
    rank = int(str(options.get("model.lora_rank", 2)))
    policy = StableDiffusionPolicy(make_pipeline(), lora_rank=rank, guidance_scale=3.0)
    prompts = PromptSet(("a cat", "a duck", "ants"))
    reward = analytic.colourfulness
    trainer = Trainer(tune(policy, config.speed), reward, prompts, config, show_progress=False)
    trainer.fit()
    own = trainer.objective.modules.state_dict()
    return trainer, {**trainer.policy.state_dict(), **own}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(tmp_path_factory.mktemp("plain"))[1]


def same_weights(found: dict[str, Tensor], known: dict[str, Tensor]) -> None:
    """Two updates of at most 0.1 each; the bound is float32 rounding through them."""
    moved = max(float(value.abs().max()) for name, value in known.items() if "lora_B" in name)
    assert moved > 1e-3
    for name, value in known.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * moved)


@pytest.mark.parametrize("switch", ["channels_last", "fused_optimizer", "offload_text_encoder"])
def test_a_switch_changes_speed_and_not_the_run(
    switch: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    trainer, found = trained(tmp_path, **{f"speed.{switch}": True})
    same_weights(found, plain)
    if switch == "channels_last":
        weight = trainer.policy.network.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    elif switch == "fused_optimizer":
        assert all(group["fused"] for group in trainer.updater.optimizer.param_groups)
    else:
        assert len(trainer.policy._encoder_hooks) == 1


@pytest.mark.slow
def test_compiled_parts_give_the_same_run(
    plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph capture and its backward passes, without the code generator (which takes minutes)."""
    monkeypatch.setattr("nablagfn.models.tune.BACKEND", "aot_eager")
    lines: list[str] = []
    monkeypatch.setattr("nablagfn.runs.progress.Bar.line", lambda bar, text: lines.append(text))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests
    _, found = trained(tmp_path, **{"speed.compile": True})
    same_weights(found, plain)
    (line,) = (text for text in lines if "torch.compile" in text)
    assert re.match(r"torch.compile: [1-9]\d* graphs, 0 graph breaks", line), line


def test_the_text_encoder_leaves_after_every_new_prompt() -> None:
    policy = make_policy(torch.float32)
    known = policy.condition(PROMPTS).tensors["prompt_embeds"]
    policy = make_policy(torch.float32)
    policy.offload_text_encoder()
    calls = []
    policy._encoder_hooks[0].offload = lambda: calls.append(1)
    assert torch.equal(policy.condition(PROMPTS).tensors["prompt_embeds"], known)
    policy.condition(PROMPTS)
    assert calls == [1]
    policy.condition(["a new one"])
    assert calls == [1, 1]


def test_the_8_bit_optimizer_trains_and_continues(tmp_path: Path) -> None:
    """As AdamW, up to what 8 bits of the moments leave; the same after a restart."""
    pytest.importorskip("bitsandbytes")
    wide = {
        "model.lora_rank": 300,
        "training.optimizer": "adamw8bit",
    }  # small matrices stay float32
    runs = []
    for name, epochs in (("whole", (2,)), ("parts", (1, 2))):
        for count in epochs:
            trainer, found = trained(tmp_path / name, **wide, **{"training.num_epochs": count})
        runs.append(found)
    assert trainer.updater.optimizer.__class__.__name__ == "AdamW8bit"
    moments = {
        value.dtype
        for s in trainer.updater.optimizer.state.values()
        for value in s.values()
        if isinstance(value, Tensor) and value.ndim > 1
    }
    assert torch.uint8 in moments
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_missing_optimizer_package_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install 'nablagfn\[adamw8bit\]'"):
        trained(tmp_path / "run", **{"training.optimizer": "adamw8bit"})
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- precision


def test_a_bf16_model_has_float32_islands() -> None:
    """Algebra, scores, reward and its gradient in float32; the stated distance to float32."""
    table, chosen = draw(make_policy(torch.float32), torch.float32)
    batch = chosen.transitions()
    seen: list[torch.dtype] = []

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        seen.append(images.dtype)
        images.register_hook(lambda gradient: seen.append(gradient.dtype))
        return analytic.colourfulness(images, prompts, metadata)

    found = []
    lora = make_policy(torch.float32).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        policy = make_policy(dtype)
        policy.load_state_dict(lora)
        batch = replace(batch, condition=policy.condition(batch.condition.prompts))
        estimator = Guess(policy, LogReward(policy, reward, BETA), "squared")
        objective = MatchingObjective(policy, table, estimator)
        here, terms = objective.evaluate(batch), objective.losses(batch).terms
        values = [here.output, here.output_ref, here.ahead.guess, here.k.c2, *terms.values()]
        assert {value.dtype for value in values} == {torch.float32}
        found.append((here.output.detach(), here.ahead.guess))
    assert set(seen) == {torch.float32}
    for bound, one, other in zip((0.03, 0.05), *found, strict=True):
        distance = float((one - other).norm() / one.norm())
        assert 1e-4 < distance < bound
