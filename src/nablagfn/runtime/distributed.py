"""Processes, devices and gradients shared by all of them (Accelerate on torch.distributed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ..config import Config

T = TypeVar("T")


def weight_dtype(config: Config, device: torch.device) -> torch.dtype:
    """dtype of the frozen weights: `training.mixed_precision` on a GPU, float32 on CPU.

    (bfloat16 on ordinary CPUs is slower than float32, so it is not used there.)
    """
    if device.type == "cpu":
        return torch.float32
    names = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return names[config.training.mixed_precision]


def gradient_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16 on a GPU; does nothing otherwise."""
    return torch.amp.GradScaler(
        device.type,
        enabled=device.type == "cuda" and config.training.mixed_precision == "fp16",
        growth_interval=config.training.gradscaler_growth_interval,
    )


def set_backend_flags(config: Config) -> None:
    """TF32 for matrix products and convolutions, as `training.allow_tf32` says."""
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.training.allow_tf32


def process_state() -> PartialState:
    """This process among its peers; joins them on first use."""
    return PartialState(cpu=not torch.accelerator.is_available())


def from_main_process(value: T) -> T:
    """The first process's `value`, on every process."""
    if process_state().num_processes == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


def gather(accelerator: Accelerator, values: list[T]) -> list[T]:
    """Every process's values, in the order of the processes, on all of them."""
    return values if accelerator.num_processes == 1 else gather_object(values)


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes: one reduction per update.

    By hand rather than by DDP: the losses take vector-Jacobian products inside the forward pass,
    which DDP's hooks do not expect, and there is nothing to overlap with at LoRA size.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    mean = accelerator.reduce(flat, reduction="mean")
    assert isinstance(mean, Tensor)
    for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.reshape(grad.shape))


def average_metrics(accelerator: Accelerator, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of each scalar over the processes."""
    names = sorted(metrics)
    values = torch.stack([metrics[name].detach().float() for name in names])
    mean = accelerator.reduce(values.to(accelerator.device), reduction="mean")
    assert isinstance(mean, Tensor)
    return dict(zip(names, mean.tolist(), strict=True))


def total(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The sum of a tensor over the processes, on all of them."""
    if accelerator.num_processes == 1:
        return value
    added = accelerator.reduce(value.to(accelerator.device), reduction="sum")
    assert isinstance(added, Tensor)
    return added


def mean(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The mean of a tensor over the processes, on all of them."""
    return total(accelerator, value) / accelerator.num_processes


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """True on every process when it is true on one."""
    if accelerator.num_processes == 1:
        return flag
    return bool(total(accelerator, torch.tensor([float(flag)])).item() > 0)
