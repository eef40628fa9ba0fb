"""The U-Net's frozen weights spread over the processes (FSDP2): a pass becomes a joint act."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
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


def parts(unet: UNet2DConditionModel) -> list[nn.Module]:
    """What is gathered at a time: each ResNet, transformer and sampler of each block."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    lists = [child for block in blocks if block is not None for child in block.children()]
    return [part for child in lists if isinstance(child, nn.ModuleList) for part in child]


def shard(
    unet: UNet2DConditionModel, device: torch.device, whole: Collection[nn.Parameter]
) -> None:
    """Keep 1/P of each weight on `device`; a part's are gathered for the time of its passes.

    whole: parameters that every process keeps, the LoRA's. From here on forward and backward passes
    must be made by all processes alike. Raises ConfigError in a single process.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    check_several(processes)
    mesh = init_device_mesh(device.type, (processes,))
    for module in [*parts(unet), unet]:
        # The root, too, is sharded after each pass: the first process alone reads the state of the
        # model to save it, which shards what was not, and would then gather alone.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))
    for parameter in whole:
        parameter.data = parameter.data.to(device)
