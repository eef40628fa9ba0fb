"""Checks of the run: model, reward, prompts, batches, and each part once forward and back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from ...core import rng
from ...core.grids import late_start
from ...core.path_kl import step_weights
from ...core.transport import step_lengths
from ...methods.build import build_kernel
from ...methods.registry import check_settings, find_method
from .records import Finding, Patient

LISTED = 50  # steps whose weights are printed one by one
HEAVY = 0.5  # share of one step in what the path KL is made of
EVEN_OUT = "what the LoRA learns for other steps costs most of its path KL there: "
ALIKE = "--config.sampling.spacing=logsnr weighs all steps alike"
MORE_ALIKE = "--config.sampling.spacing=angle weighs the steps more alike"


def model(patient: Patient) -> Finding:
    """The pretrained model is found and loads."""
    policy = patient.policy
    shape = "x".join(map(str, policy.sample_shape))
    return Finding("ok", f"{patient.config.pretrained.model}: samples of {shape}")


def reward(patient: Patient) -> Finding:
    """The reward is found and its weights load."""
    found = patient.reward
    return Finding("ok", found.name + ("" if found.differentiable else ", values only"))


def prompts(patient: Patient) -> Finding:
    found = patient.prompts
    return Finding("ok", f"{len(found)} to train on, {len(found.held_out)} held out")


def batches(patient: Patient) -> Finding:
    """The divisions come out, over all processes; no two options contradict each other."""
    config = patient.config
    check_settings(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    updates = config.updates_per_epoch() * config.training.num_inner_epochs
    paths = config.sampling.batch_size * config.sampling.num_batches_per_epoch
    text = f"{paths} paths x {processes} processes per epoch, {updates} updates"
    if updates == 1 and config.model.unet_reg_scale:
        fix = "--config.training.num_inner_epochs=2, or take it as it is"
        return Finding("warning", f"{text}: the trust region has no effect", fix)
    return Finding("ok", text)


def steps(patient: Patient) -> Finding:
    """The sampler's steps, and what each weighs in the path KL, or in the transport cost."""
    policy = patient.policy
    table = build_kernel(patient.config, policy)
    weights = step_lengths(table) if table.ode else step_weights(table)
    weighed = "Δt" if table.ode else "(c2/σ)²"
    heaviest, whole = int(weights.argmax()), float(weights.sum())
    share = float(weights[heaviest]) / whole
    listed = " ".join(f"{weight:.2g}" for weight in weights.tolist())
    if len(weights) > LISTED:
        low, high = float(weights.min()), float(weights.max())
        listed = f"{low:.2g} … {high:.2g}"
    first, last = (f"{time:.4g}" for time in table.time[[0, -2]].tolist())
    text = f"{len(weights)} from time {first} to {last}, {weighed} {listed}"
    late = late_start(table, policy.noising)
    if late:
        return Finding("warning", text, late)
    if share > HEAVY:
        place = f"{table.time[heaviest]:.4g} to {table.time[heaviest + 1]:.4g}"
        text = f"{text}; step {heaviest} ({place}) has {share:.0%} of their sum"
        silent = float(table.schedule.alpha[0]) == 0  # where the log-SNR is infinite
        return Finding("warning", text, EVEN_OUT + (MORE_ALIKE if silent else ALIKE))
    return Finding("ok", text)


def denoiser(patient: Patient) -> Finding:
    """ε_θ(x) with gradient to x and to the adapter."""
    policy = patient.policy
    started = time.perf_counter()
    table = build_kernel(patient.config, policy)
    x = _sample(patient).requires_grad_()
    k = table.at_step(table.num_steps // 2, x)
    output = policy.output(x, k.here.time, policy.condition(patient.prompts.prompts[:1], ()))
    return _judge(
        "", torch.autograd.grad(output.square().sum(), [x, *policy.parameters()]), started
    )


def decoder(patient: Patient) -> Finding:
    """Picture of a sample, with gradient to the sample."""
    started = time.perf_counter()
    x = _sample(patient).requires_grad_()
    images = patient.policy.decode(x)
    shape = "x".join(map(str, images.shape[1:]))
    return _judge(f"{shape}, ", torch.autograd.grad(images.square().sum(), x), started)


def gradient(patient: Patient) -> Finding:
    """Score of a picture, with gradient to its pixels where the reward has one."""
    started = time.perf_counter()
    with torch.no_grad():
        images = patient.policy.decode(_sample(patient)).float()
    images.requires_grad_(patient.reward.differentiable)
    asked = patient.prompts.prompts[:1]
    value = patient.reward(images, asked, patient.prompts.metadata(asked))
    text = f"{float(value.detach()):.3g}, "
    if not patient.reward.differentiable:
        return Finding("ok", f"{text}values only")
    return _judge(text, torch.autograd.grad(value.sum(), images), started)


def flow(patient: Patient) -> Finding:
    """g_φ, where the run learns one, with gradient to its weights."""
    config, policy = patient.config, patient.policy
    if not find_method(config.experiment.method).learns_flow(config):
        return Finding("ok", "none")
    started, settings = time.perf_counter(), config.model
    net = policy.make_flow(settings.flow_channel_width, settings.flow_layers_per_block, seed=0)
    x, timestep = _sample(patient), torch.ones(1, dtype=torch.long, device=patient.device)
    value = net(x, timestep, policy.condition(patient.prompts.prompts[:1], ()))
    return _judge("", torch.autograd.grad(value.sum(), list(net.parameters())), started)


def _sample(patient: Patient) -> Tensor:
    """[1, ...] standard normal."""
    shape = patient.policy.sample_shape
    return rng.normal(shape, [0], seed=0, purpose="doctor").to(patient.device)


def _judge(text: str, gradients: Iterable[Tensor], started: float) -> Finding:
    """Finite, and not all zero."""
    size = float(torch.stack([g.detach().float().square().sum() for g in gradients]).sum().sqrt())
    text += f"gradient of size {size:.2g}, {time.perf_counter() - started:.1f} s"
    if not torch.isfinite(torch.tensor(size)):
        fix = "the weights are damaged, or try --config.training.mixed_precision=no"
        return Finding("failure", text, fix)
    if size == 0:
        return Finding(
            "failure", text, "nothing can be learned through this part: see check-reward"
        )
    return Finding("ok", text)
