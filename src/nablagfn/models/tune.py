"""Switches that change how fast a latent policy runs, and not what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError, Speed
from .latent import LatentPolicy

BACKEND = "inductor"
GRAPHS: dict[str, Any] = {"mode": "reduce-overhead"}  # of torch.compile, for CUDA graphs
VARIANTS = 32  # θ on, off or frozen, with and without gradients, batches of several sizes
UNCHECKED = "skip_tensor_guards_with_matching_dict_tags"  # of torch._dynamo.config


def tune(policy: LatentPolicy, speed: Speed) -> LatentPolicy:
    """Set the policy up as `speed` says; returns it.

    CUDA graphs are left out elsewhere than on CUDA, where a finished run may be looked at too.
    """
    if speed.channels_last:
        for module in (policy.network, policy.vae):
            channels_last(module)
    if speed.compile:
        compile_modules((policy.network, policy.vae.decoder))
    if speed.cuda_graphs and has_graphs(policy.device):
        use_cuda_graphs(policy)
    if speed.offload_text_encoder:
        policy.offload_text_encoder()
    policy.speed = speed.model_copy()
    return policy


def channels_last(module: nn.Module) -> None:
    """Lay out the weights of two-dimensional convolutions so; others have no such format."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def check_speed(speed: Speed, device: torch.device) -> None:
    """Raises ConfigError for what this device does not have."""
    if speed.cuda_graphs and not has_graphs(device):
        raise ConfigError(
            f"config.speed.cuda_graphs=True needs a CUDA device, and this process has {device.type}"
            ": leave it out"
        )


def compile_modules(modules: Iterable[nn.Module]) -> None:
    """torch.compile, each variant at its first use.

    The reverse loss goes back twice through one graph, so compiled backward passes must not give
    their buffers away.
    """
    _tell_variants_apart()
    torch._functorch.config.donated_buffer = False
    for module in modules:
        module.compile(backend=BACKEND)


def _tell_variants_apart() -> None:
    """A graph is used again only where each parameter is as it was, `requires_grad` included.

    torch up to 2.11 takes a parameter for unchanged while the dict that holds it is
    (pytorch/pytorch#177158). θ, switched off and on in place by `without_theta` and
    `Policy.reference`, was then trained with the graph that leaves it out: no gradient, no error.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    if hasattr(torch._dynamo.config, UNCHECKED):
        setattr(torch._dynamo.config, UNCHECKED, False)


def use_cuda_graphs(policy: LatentPolicy) -> None:
    """Passes of the network without gradient, those of sampling, as CUDA graphs: one per shape."""
    _tell_variants_apart()
    policy.network_free = Replayed(torch.compile(policy.network.forward, dynamic=False, **GRAPHS))


class Replayed:
    """A compiled function whose results lie where its next call writes: they are copied."""

    def __init__(self, run: Callable[..., tuple[Tensor, ...]]) -> None:
        self.run = run

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(value.clone() for value in self.run(*arguments, **options))
