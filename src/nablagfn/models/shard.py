"""The network's frozen weights spread over the processes (FSDP2): a pass becomes a joint act."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..config import ConfigError


def check_several(processes: int) -> None:
    """Raises ConfigError for a single process."""
    if processes == 1:
        raise ConfigError(
            "config.training.shard_base=True needs several processes, this is one: there is "
            "nothing to shard; start it with torchrun, or leave the option out"
        )


def parts(network: Any) -> list[nn.Module]:
    """What is gathered at a time: each ResNet, transformer and sampler of a U-Net's blocks, each
    block of a transformer."""
    if hasattr(network, "down_blocks"):
        blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]
        lists = [child for block in blocks if block is not None for child in block.children()]
    else:
        lists = list(network.children())
    return [part for child in lists if isinstance(child, nn.ModuleList) for part in child]


def shard(network: nn.Module, device: torch.device, whole: Collection[nn.Parameter]) -> None:
    """Keep 1/P of each weight on `device`; a part's are gathered for the time of its passes.

    whole: parameters that every process keeps, the LoRA's. From here on forward and backward passes
    must be made by all processes alike. Raises ConfigError in a single process.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    check_several(processes)
    mesh = init_device_mesh(device.type, (processes,))
    for module in [*parts(network), network]:
        # The root, too, is sharded after each pass: the first process alone reads the state of the
        # model to save it, which shards what was not, and would then gather alone.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))
    for parameter in whole:
        parameter.data = parameter.data.to(device)
