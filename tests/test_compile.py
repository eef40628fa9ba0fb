"""torch.compile of the reward, and CUDA graphs: what can be seen of them on a CPU."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nablagfn.cli import main
from nablagfn.commands import assemble
from nablagfn.commands.doctor import Exam, examine, machine
from nablagfn.config import ConfigError
from nablagfn.core.counting import compilations
from nablagfn.core.lookahead import without_theta
from nablagfn.core.types import Condition
from nablagfn.models import tune
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.recipes.options import load_config
from nablagfn.rewards import NamedReward, named, networks_of, offloaded, resolve
from tests.test_speed import draw, make_policy, plain, same_weights, trained
from tests.tiny_rewards import save_weights

CPU = torch.device("cpu")
REWARDS = ["tiny-aesthetic", "tiny-alignment", "aesthetic", "hpsv2", "imagereward"]
__all__ = ["plain"]  # a fixture


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_weights(tmp_path_factory.mktemp("weights")))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graph capture and its backward passes, without the code generator (which takes minutes)."""
    monkeypatch.setattr(tune, "BACKEND", "aot_eager")
    monkeypatch.setattr(tune, "GRAPHS", {"backend": "aot_eager"})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def scored(reward: NamedReward, prompt: str) -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).requires_grad_()
    value = reward(x, [prompt, "a dog"], [{}, {}])
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("name", REWARDS)
def test_a_compiled_reward_gives_the_same_without_breaks(
    name: str, away: bool, weights: str, captured: None
) -> None:
    """And new prompts make no new graphs; also with weights that come and go."""
    reward = resolve(name, CPU, weights)
    prompts = ("a cat", "an ant", "a long prompt")
    known = [scored(reward, prompt) for prompt in prompts]
    tune.compile_modules(networks_of(reward))
    if away:
        reward = offloaded(reward)
    for prompt, (value, gradient) in zip(prompts, known, strict=True):
        found = scored(reward, prompt)
        torch.testing.assert_close(found[0], value, rtol=1e-4, atol=1e-5)
        bound = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(found[1], gradient, rtol=1e-3, atol=bound)
    networks = len(networks_of(resolve(name, CPU, weights)))
    assert compilations() == f"torch.compile: {networks} graphs, 0 graph breaks"


def test_a_user_s_network_is_compiled_whole_and_its_breaks_are_counted(captured: None) -> None:
    class Breaking(nn.Linear):
        def forward(self, images: Tensor, *rest: object) -> Tensor:  # type: ignore[override]
            x = self.weight[0, 0] * images.mean((1, 2, 3))
            torch._dynamo.graph_break()
            return x.square()

    reward = named(Breaking(1, 1))
    known = scored(reward, "a cat")
    tune.compile_modules(networks_of(reward))
    assert torch.equal(scored(reward, "a cat")[0], known[0])
    assert re.match(r"torch.compile: 2 graphs, 1 graph breaks; .", compilations())


State = tuple[bool, ...]  # frozen model, without θ, with gradients
STATES: list[State] = list(product((False, True), repeat=3))


def passed(
    policy: StableDiffusionPolicy, state: State, x: Tensor, where: Condition
) -> list[Tensor]:
    """ε, and its gradients for x_k and θ: zeros where nothing arrives."""
    frozen, without, graph = state
    x = x.clone().requires_grad_(graph)
    with ExitStack() as inside:
        if frozen:
            inside.enter_context(policy.reference())
        if without:
            inside.enter_context(without_theta(policy))
        inside.enter_context(torch.set_grad_enabled(graph))
        eps = policy.output(x, torch.full((len(x),), 7), where)
        if not graph:
            return [eps]
        wanted = [x, *(p for p in policy.parameters() if p.requires_grad)]
        loss = eps.square().sum()
        return [eps.detach(), *torch.autograd.grad(loss, wanted, materialize_grads=True)]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_no_graph_is_used_for_another_state(broken: bool, captured: None) -> None:
    """Each state after each other one; the two that were mixed up also with a break within.

    The switches of a model change its parameters' `requires_grad` in place.
    """
    policy = make_policy(torch.float32, guidance_scale=1.0)
    _, chosen = draw(policy, torch.float32)
    x, where = chosen.paths.x[:, 1], chosen.paths.condition
    known = {state: passed(policy, state, x, where) for state in STATES}
    far = known[STATES[0]][0] - known[(True, False, False)][0]
    assert float(far.abs().max()) > 1e-3
    if broken:
        last = policy.network.conv_norm_out
        last.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    tune.compile_modules((policy.network,))
    pairs = list(product(STATES[1:4:2] if broken else STATES, repeat=2))
    random.Random(0).shuffle(pairs)
    for state in (state for pair in pairs for state in pair):
        found = passed(policy, state, x, where)
        assert len(found) == len(known[state]), state
        for one, two in zip(found, known[state], strict=True):
            bound = 1e-4 * float(two.abs().max()) + 1e-9
            torch.testing.assert_close(one, two, rtol=1e-3, atol=bound, msg=str(state))
    graphs = re.match(r"torch.compile: (\d+) graphs, (\d+) graph breaks", compilations())
    assert graphs and int(graphs[1]) <= 2 * len(STATES) and (int(graphs[2]) > 0) == broken


def test_the_option_compiles_the_reward_and_nothing_else(captured: None) -> None:
    config = load_config("demo")
    for on in (False, True):
        config.speed.compile_reward = on
        reward = assemble.build_reward(config, CPU)
        policy: Any = assemble.build_policy(config, CPU)
        assert all((m._compiled_call_impl is not None) == on for m in networks_of(reward))
        assert policy.network._compiled_call_impl is policy.vae.decoder._compiled_call_impl is None


@pytest.mark.parametrize("switch", ["compile", "compile_reward", "cuda_graphs"])
def test_each_of_them_is_told_of_after_the_first_epoch(switch: str) -> None:
    config = load_config("demo")
    assert not config.speed.compiles
    setattr(config.speed, switch, True)
    assert config.speed.compiles


# -------------------------------------------------------------------------------- CUDA graphs


class Reusing:
    """As a CUDA graph is: the result of each call lies where the last one's lay."""

    def __init__(self, run: Any, log: list[str]) -> None:
        self.run, self.log = run, log
        self.buffer = torch.empty(0)

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor]:
        self.log.append("grad" if torch.is_grad_enabled() else "free")
        out = self.run(*arguments, **options)[0]
        if self.buffer.shape != out.shape:
            self.buffer = torch.empty_like(out)
        self.buffer.copy_(out)
        return (self.buffer,)


def test_paths_drawn_by_graphs_that_reuse_their_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to those drawn without; each call begins a step; none is made with gradients."""
    policy, log = make_policy(guidance_scale=1.0), list[str]()
    _, known = draw(policy)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: log.append("step"))
    policy.network_free = tune.Replayed(Reusing(policy.network, log))
    _, found = draw(policy)
    assert torch.equal(found.paths.x, known.paths.x)
    assert torch.equal(found.paths.output, known.paths.output)
    assert log == ["step", "free"] * found.paths.num_steps
    x = found.paths.x[:, 0].clone().requires_grad_()
    eps = policy.output(x, torch.ones(len(x), dtype=torch.long), found.paths.condition)
    assert eps.requires_grad and len(log) == 2 * found.paths.num_steps


def test_two_results_do_not_share_their_memory() -> None:
    run = tune.Replayed(Reusing(lambda x: (x + 1,), []))
    one, two = run(torch.zeros(3))[0], run(torch.ones(3))[0]
    assert one.tolist() == [1, 1, 1] and two.tolist() == [2, 2, 2]


def test_graphs_of_the_u_net_give_the_same_run(
    captured: None, plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured for a CPU: sampling before and after an update, which changes the LoRA in place."""
    monkeypatch.setattr(tune, "has_graphs", lambda device: True)
    lines: list[str] = []
    monkeypatch.setattr("nablagfn.runs.progress.Bar.line", lambda bar, text: lines.append(text))
    trainer, found = trained(tmp_path, **{"speed.cuda_graphs": True})
    assert isinstance(trainer.policy.network_free, tune.Replayed)
    same_weights(found, plain)
    (line,) = (text for text in lines if "torch.compile" in text)
    assert re.match(r"torch.compile: [1-9]\d* graphs, 0 graph breaks", line), line


def test_they_tell_the_frozen_model_from_the_tuned_one(captured: None) -> None:
    """In turns: a graph of the one must not be replayed for the other."""
    policy = make_policy(torch.float32)
    _, chosen = draw(policy, torch.float32)
    x, where = chosen.paths.x[:, 1], chosen.paths.condition
    time = torch.full((len(x),), 7)

    def both() -> list[Tensor]:
        with torch.no_grad():
            tuned = policy.output(x, time, where)
            with policy.reference():
                return [tuned, policy.output(x, time, where)]

    known = both()
    assert float((known[0] - known[1]).abs().max()) > 1e-3
    tune.use_cuda_graphs(policy)
    for found in (both(), both()):
        for one, two in zip(found, known, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert compilations() == "torch.compile: 2 graphs, 0 graph breaks"


def test_they_are_refused_where_there_is_no_cuda_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written; a finished run is looked at without them."""
    options = ["--config.speed.cuda_graphs=True", f"--config.saving.output_dir={tmp_path / 'runs'}"]
    with pytest.raises(SystemExit) as end:
        main(["train", "--config=demo", *options])
    assert end.value.code == 2 and not (tmp_path / "runs").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "config.speed.cuda_graphs=True needs a CUDA device" in line
    config = load_config("demo")
    config.speed.cuda_graphs = True
    policy: Any = assemble.build_policy(config, CPU)
    assert policy.network_free is None
    (row,) = examine(config, CPU, [Exam("device", machine.devices)])
    assert row.finding.status == "failure" and "cuda_graphs" in row.finding.text
    tune.check_speed(config.speed, torch.device("cuda"))
    with pytest.raises(ConfigError, match="leave it out"):
        tune.check_speed(config.speed, torch.device("mps"))
