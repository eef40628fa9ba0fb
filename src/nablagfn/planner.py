"""`nablagfn plan`: what a run takes in memory, and the settings with which it fits.

    peak = fixed + max over the moments of an update (rows × what a row holds then)

Fixed are weights, gradients, moments and the epoch's paths. What a row holds is counted on the meta
device for the run's own architecture (`costs`); which parts are alive together is `ALIVE`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from . import architectures, rewards, worlds
from .collect import Collector
from .config import Config, ConfigError, flatten
from .costs import Cost, cost, per_row, size_of
from .counting import Counts, counted
from .distributed import weight_dtype
from .methods import build_kernel, build_objective
from .models.stable_diffusion import StableDiffusionPolicy
from .prompts import PromptSet
from .rewards import NamedReward
from .rewards.clip import ClipScore
from .rewards.imagereward import ImageReward
from .types import Condition
from .worlds.policy import WorldPolicy, WorldReward

META = torch.device("meta")
CONTEXT = 0.6e9  # bytes of a CUDA context and its libraries; assumed, not measured
SLACK = 1.1  # on what comes and goes: fragmentation, workspaces; assumed, not measured
ENOUGH = 4  # rows per forward pass from which more gain little; assumed, not measured
PROMPT = "a"  # any will do
NOTHING = Cost(0, 0, 0, 0)


@dataclass(frozen=True)
class Alive:
    """U-Net graphs of one row that are alive at once: while a reward is differentiated through
    them, and when none is. with_reward: None where no reward is differentiated. kept: the first are
    not freed on the way back, the loss needs them."""

    with_reward: int | None
    alone: int
    kept: bool = False


def _draft(config: Config) -> Alive:
    return Alive(min(config.method.draft_steps, config.sampling.num_steps), 0)


ALIVE: dict[str, Callable[[Config], Alive]] = {
    "nabla-db": lambda config: Alive(1, 1, kept=not config.model.no_flow),
    "nabla-db-lambda": lambda config: Alive(3, 2),  # θ's, the frozen model's and the guess's
    "adjoint-matching": lambda config: Alive(0, 1),
    "terminal-gradient": lambda config: Alive(0, 1),
    "refl": lambda config: Alive(1, 0),
    "draft-k": _draft,
    "draft-lv": lambda config: Alive(1, 0),
    "alignprop": lambda config: Alive(config.sampling.num_steps, 0),  # at most
    "ddpo": lambda config: Alive(None, 1),
    "dag-db": lambda config: Alive(None, 1),
}


@dataclass(frozen=True)
class Work:
    """Of one path of an update, guided evaluations and decodes, forward and backward apart.

    transitions: how many are learned from. The drawing of the path is in it.
    """

    transitions: float
    eps: float
    eps_backward: float
    decode: float
    decode_backward: float


def work_of(config: Config) -> Work:
    """Counted in a world, where an update takes no time: counts do not depend on the model."""
    paths = 8
    world = worlds.load("gaussian")
    config = config.model_copy(deep=True)
    config.sampling.batch_size = config.training.batch_size = paths
    config.sampling.num_batches_per_epoch = config.training.gradient_accumulation_steps = 1
    counts = Counts()
    policy = counted(WorldPolicy(world), counts)
    table, prompts = build_kernel(config, policy), PromptSet(world.prompts)
    reward = NamedReward("gaussian", WorldReward(world))
    objective = build_objective(config, policy, reward, prompts, table)
    collector = Collector(policy, table, prompts, config)
    drawn = replace(collector.collect(0), reward=torch.zeros(paths))
    objective.observe(drawn.condition.prompts, torch.zeros(paths))
    (chosen,) = collector.batches(drawn, 0, 0, objective)
    batch = chosen.transitions(objective.prepare(chosen))
    objective.losses(batch).total().sum().backward()
    c = counts
    return Work(
        len(batch) / paths,
        (c.model - c.model_backward) / paths,
        c.model_backward / paths,
        c.decode / paths + 1,  # and its reward, once
        c.decode_backward / paths,
    )


@dataclass(frozen=True)
class Parts:
    """A run's model in numbers. fixed: bytes by what they are. The costs are those of one row, a
    guided evaluation counting as one; `_checkpointed` with gradient checkpointing, `_free` without
    gradient. sample: bytes of one x."""

    fixed: Mapping[str, float]
    eps: Cost
    eps_checkpointed: Cost
    eps_free: Cost
    decode: Cost
    decode_free: Cost
    reward: Cost
    reward_free: Cost
    flow: Cost
    sample: float


def measure(config: Config, device: torch.device) -> Parts:
    """Counted for `config` on a device like this one.

    Raises ConfigError when the model's configuration or the reward cannot be had.
    """
    if worlds.is_world(config.pretrained.model):
        raise ConfigError(f"{config.pretrained.model} is a world: it fits into any memory")
    dtype = weight_dtype(config, device)
    with META:
        pipeline = architectures.by_configuration(
            config.pretrained.model, config.pretrained.revision
        )
        _cast(pipeline.unet, dtype)
        _cast(pipeline.text_encoder, dtype)
        _cast(pipeline.vae, torch.float32 if dtype == torch.float16 else dtype)
        policy = StableDiffusionPolicy(
            pipeline,
            guidance_scale=config.sampling.guidance_scale,
            lora_rank=config.model.lora_rank,
            vae_checkpointing=config.training.vae_checkpointing,
        )
        model = config.model
        flow = policy.make_flow(model.flow_channel_width, model.flow_layers_per_block, seed=0)
        subject = _Subject(policy, flow, _reward(config))
        return subject.parts(_fixed(config, subject))


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _reward(config: Config) -> NamedReward:
    """The reward on the meta device; the large ones by their architecture alone."""
    name = config.experiment.reward_fn
    if name in architectures.REWARDS:
        reward = NamedReward(name, architectures.REWARDS[name]())
    else:
        with torch.device("cpu"):  # weights that are read are moved when they are there
            reward = rewards.resolve(name, META, config.reward.weights, config.reward)
    for module in modules_of(reward):
        if isinstance(module, ImageReward):
            module.text = _PassedBy(module.text)
        if isinstance(module, ClipScore):  # prompts are encoded once, without gradient
            width = module.model.config.projection_dim
            module.remember(PROMPT, torch.zeros(width, device="cpu"))
    return reward


class _PassedBy(nn.Module):
    """In place of BLIP's text encoder, which looks into its mask and so needs true tokens. Its
    weights count; its work, a tenth of the picture encoder's, does not."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text
        self.width: int = text.config.hidden_size

    def forward(self, encoder_hidden_states: Tensor, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=encoder_hidden_states[..., : self.width])


def modules_of(thing: object) -> list[nn.Module]:
    """The modules within a reward: itself, or in its attributes."""
    if isinstance(thing, nn.Module):
        return [thing]
    if isinstance(thing, (tuple, list)):
        return [module for part in thing for module in modules_of(part)]
    return modules_of(list(vars(thing).values())) if hasattr(thing, "__dict__") else []


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


@dataclass(frozen=True)
class _Subject:
    """The parts of a run on the meta device, each with the cost of some rows."""

    policy: StableDiffusionPolicy
    flow: nn.Module
    reward: NamedReward

    def parts(self, fixed: Mapping[str, float]) -> Parts:
        return Parts(
            fixed=fixed,
            eps=per_row(lambda rows: self.eps(rows, True)),
            eps_checkpointed=per_row(self.eps_checkpointed),
            eps_free=per_row(lambda rows: self.eps(rows, False)),
            decode=per_row(lambda rows: self.decode(rows, True)),
            decode_free=per_row(lambda rows: self.decode(rows, False)),
            reward=per_row(lambda rows: self.score(rows, True)),
            reward_free=per_row(lambda rows: self.score(rows, False)),
            flow=per_row(self.guess),
            sample=size_of([self.x(1)]),
        )

    def x(self, rows: int) -> Tensor:
        return torch.zeros(rows, *self.policy.sample_shape)

    def text(self, rows: int) -> Tensor:
        words = self.policy.pipeline.text_encoder.config
        return torch.zeros(rows, words.max_position_embeddings, words.hidden_size)

    def eps(self, rows: int, gradient: bool) -> Cost:
        policy, copies = self.policy, 1 if self.policy.guidance_scale == 1.0 else 2
        x = self.x(rows).requires_grad_(gradient)
        time = torch.zeros(copies * rows, dtype=torch.long)
        text = self.text(copies * rows).to(policy.dtype)

        def run() -> Tensor:
            seen = torch.cat([x] * copies).to(policy.dtype)
            return policy.unet(seen, time, text, return_dict=False)[0].float()

        found = cost(run, [*_tensors([policy.unet]), x, time, text], gradient=gradient)
        policy.unet.zero_grad(set_to_none=True)
        return found

    def eps_checkpointed(self, rows: int) -> Cost:
        unet = self.policy.unet
        unet.enable_gradient_checkpointing()
        unet.train()
        try:
            return self.eps(rows, True)
        finally:
            unet.disable_gradient_checkpointing()
            unet.eval()

    def decode(self, rows: int, gradient: bool) -> Cost:
        x = self.x(rows).requires_grad_(gradient)
        run = functools.partial(self.policy.decode, x)
        return cost(run, [*_tensors([self.policy.vae]), x], gradient=gradient)

    def score(self, rows: int, gradient: bool) -> Cost:
        if not self.reward.differentiable:  # a black box may need true pictures
            return NOTHING
        images = self.policy.decode(self.x(rows)).detach().requires_grad_(gradient)
        run = functools.partial(self.reward, images, [PROMPT] * rows, [{}] * rows)
        known = [*_tensors(modules_of(self.reward)), images]
        try:
            return cost(run, known, gradient=gradient)
        except (RuntimeError, NotImplementedError, ConfigError) as error:
            raise ConfigError(
                f"config.experiment.reward_fn={self.reward.name!r} cannot be counted without "
                f"pictures ({error}): plan with a built-in reward of its size"
            ) from None

    def guess(self, rows: int) -> Cost:
        x, text, time = self.x(rows), self.text(rows), torch.zeros(rows, dtype=torch.long)
        where = Condition((PROMPT,) * rows, ({},) * rows, text)
        found = cost(
            functools.partial(self.flow, x, time, where),
            [*_tensors([self.flow]), x, text, time],
        )
        self.flow.zero_grad(set_to_none=True)
        return found


def _learns_flow(config: Config) -> bool:
    learns = config.experiment.method in ("nabla-db", "nabla-db-lambda", "dag-db")
    return learns and not config.model.no_flow


def _fixed(config: Config, subject: _Subject) -> dict[str, float]:
    """Bytes of weights, and of gradients and moments of what is trained."""
    pipeline, theta = subject.policy.pipeline, size_of(subject.policy.parameters())
    flow = size_of(subject.flow.parameters()) if _learns_flow(config) else 0
    copies = 3 if config.training.optimizer == "lion" else 4  # weight, gradient, moments
    return {
        "U-Net": size_of(_tensors([pipeline.unet])) - theta,
        "VAE": size_of(_tensors([pipeline.vae])),
        "text encoder": size_of(_tensors([pipeline.text_encoder])),
        "reward": size_of(_tensors(modules_of(subject.reward))),
        "LoRA and its optimizer": copies * theta,
        "flow network and its optimizer": copies * flow,
    }


@dataclass(frozen=True)
class Setting:
    """What the planner may choose. None of it changes results beyond rounding."""

    micro_batch: int
    gradient_checkpointing: bool
    vae_slice: int
    sampling_batch: int


def moments(config: Config, parts: Parts, work: Work, setting: Setting) -> dict[str, float]:
    """Bytes beside the fixed ones at each moment of an epoch."""
    s, t, p = config.sampling, config.training, parts
    paths = s.batch_size * s.num_batches_per_epoch
    path = (2 * s.num_steps + 1) * p.sample  # x and ε_θ† of every step
    used = t.batch_size * t.gradient_accumulation_steps
    held = paths * path + used * (path + 3 * work.transitions * p.sample)
    batch = setting.sampling_batch
    piece = min(batch, setting.vae_slice or batch)
    decoding = batch * p.decode_free.held + piece * p.decode_free.passing
    scoring = batch * (p.decode_free.held + p.reward_free.peak)
    found = {
        "drawing": 2 * paths * path + SLACK * batch * (p.eps_free.peak + path),
        "rewards of the epoch": paths * path + SLACK * max(decoding, scoring),
    }
    for name, value in _update(config, parts, setting).items():
        found[f"update, {name}"] = held + SLACK * value
    return found


def _update(config: Config, parts: Parts, setting: Setting) -> dict[str, float]:
    """Bytes of graphs and of what passes, of one micro-batch."""
    p, rows = parts, setting.micro_batch
    eps = p.eps_checkpointed if setting.gradient_checkpointing else p.eps
    flow = p.flow if _learns_flow(config) else NOTHING
    alive = ALIVE[config.experiment.method](config)
    alone = alive.alone * eps.held + 2 * flow.held + max(eps.passing, flow.passing)
    found = {"the rest": rows * alone}
    if alive.with_reward is None:
        return found
    piece = min(rows, setting.vae_slice or rows)
    kept = rows * (alive.with_reward * eps.held + 2 * flow.held * alive.kept)
    if alive.kept and piece == rows:
        passing = max(eps.passing, p.decode.passing, p.reward.passing)
        kept += rows * (p.decode.held + p.reward.held + passing)
    else:  # decoder and reward are gone before the way back through the U-Net
        decoded = piece * max(p.decode.held + p.reward.peak, p.decode.peak)
        kept += max(decoded, rows * eps.passing)
    return {"reward's gradient": kept, **found}


@dataclass(frozen=True)
class Plan:
    """setting: None when nothing fits; then the figures are those of the smallest setting."""

    setting: Setting | None
    usable: float
    fixed: Mapping[str, float]
    moments: Mapping[str, float]
    eps: float
    flops: float

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.fixed.values()) + max(self.moments.values())

    def options(self, config: Config) -> dict[str, Any]:
        """The options that set it, by dotted name; those that `config` has already left out."""
        if self.setting is None:
            return {}
        chosen, s = self.setting, config.sampling
        drawn = s.batch_size * s.num_batches_per_epoch
        wanted = {
            "training.micro_batch": chosen.micro_batch,
            "training.gradient_checkpointing": chosen.gradient_checkpointing,
            "training.vae_slice": chosen.vae_slice,
            "sampling.batch_size": chosen.sampling_batch,
            "sampling.num_batches_per_epoch": drawn // chosen.sampling_batch,
        }
        has = flatten(config)
        return {key: value for key, value in wanted.items() if value != has[key]}


def free_memory(device: torch.device) -> float:
    """Bytes that this process could still take on the device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def parse_memory(text: str) -> float:
    """'24GB' (10^9), '24GiB' (2^30), '24' (GB) -> bytes. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB|)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--memory={text}: give a number above 0 with GB, GiB, MB or MiB: 24GB")
    units = {"": 1e9, "GB": 1e9, "MB": 1e6, "GiB": 2.0**30, "MiB": 2.0**20}
    return float(found[1]) * units[found[2]]


def plan(config: Config, memory: float, device: torch.device) -> Plan:
    """The settings for `memory` bytes of a device like this one. Raises ConfigError like
    `measure`."""
    usable = memory - (CONTEXT if device.type == "cuda" else 0.0)
    return choose(config, measure(config, device), work_of(config), usable)


def choose(config: Config, parts: Parts, work: Work, usable: float) -> Plan:
    """The settings for `usable` bytes at the effective batch of `config`.

    Of three ways to save, in the order of the work that they add, the first that leaves room for
    enough rows per forward pass: none, decoding one picture at a time, and checkpointing too.
    """
    plain = setting_of(config)
    slices = replace(plain, vae_slice=1)
    ways = (plain, slices, replace(slices, gradient_checkpointing=True))
    found = [_largest(config, parts, work, usable, way) for way in ways]
    enough = min(ENOUGH, _rows(config, work))
    good = [p for p in found if p.setting and p.setting.micro_batch >= enough]
    return good[0] if good else max(found, key=lambda p: p.setting.micro_batch if p.setting else 0)


def setting_of(config: Config) -> Setting:
    """As `config` has it."""
    t = config.training
    rows = t.micro_batch or t.batch_size
    return Setting(rows, t.gradient_checkpointing, t.vae_slice, config.sampling.batch_size)


def predict(config: Config, device: torch.device) -> Plan:
    """The run as `config` has it. Raises ConfigError like `measure`."""
    return _planned(config, measure(config, device), work_of(config), math.inf, setting_of(config))


def _planned(config: Config, parts: Parts, work: Work, usable: float, setting: Setting) -> Plan:
    found = moments(config, parts, work, setting)
    arithmetic = _arithmetic(config, parts, work, setting.gradient_checkpointing)
    return Plan(setting, usable, parts.fixed, found, *arithmetic)


def _rows(config: Config, work: Work) -> int:
    """Transitions of one update and process."""
    t = config.training
    return round(t.batch_size * t.gradient_accumulation_steps * work.transitions)


def _largest(config: Config, parts: Parts, work: Work, usable: float, way: Setting) -> Plan:
    """The largest micro-batch and sampling batch that fit, saving as `way` does."""
    s, rows = config.sampling, _rows(config, work)
    splits = sorted({math.ceil(rows / n) for n in range(1, rows + 1)}, reverse=True)
    batches = [n for n in range(s.batch_size, 0, -1) if s.batch_size % n == 0]

    def tried(micro: int, batch: int) -> Plan:
        setting = replace(way, micro_batch=micro, sampling_batch=batch)
        return _planned(config, parts, work, usable, setting)

    batch = next((n for n in batches if tried(1, n).peak <= usable), 1)
    micro = next((n for n in splits if tried(n, batch).peak <= usable), 0)
    return tried(micro, batch) if micro else replace(tried(1, batch), setting=None)


def _arithmetic(
    config: Config, parts: Parts, work: Work, checkpointing: bool
) -> tuple[float, float]:
    """Guided evaluations and FLOPs of one update and process, its share of drawing included."""
    paths = config.training.batch_size * config.training.gradient_accumulation_steps
    share = paths / config.training.num_inner_epochs
    drawing = share * config.sampling.num_steps
    p, eps = parts, parts.eps_checkpointed if checkpointing else parts.eps
    learned = work.eps - config.sampling.num_steps
    flops = (drawing + paths * learned) * eps.forward
    flops += paths * work.eps_backward * eps.backward
    flops += paths * work.decode * (p.decode.forward + p.reward.forward)
    flops += paths * work.decode_backward * (p.decode.backward + p.reward.backward)
    return drawing + paths * (learned + work.eps_backward), flops
