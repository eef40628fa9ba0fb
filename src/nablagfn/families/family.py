"""What differs between models stands in the record of their family. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import Config

if TYPE_CHECKING:
    import torch

    from ..core.kernels import KernelTable
    from ..core.types import Policy, View
    from ..models.latent import LatentPolicy
    from ..models.latent_model import LatentModel
    from ..prompts import PromptSet
    from ..rewards import NamedReward


@dataclass(frozen=True)
class StockSampler:
    """How diffusers draws as a run does.

    scheduler: the name of its class. options: of `from_config`. taken: further ones, which have the
    value of another of the pretrained scheduler's. call: arguments of the pipeline. guidance: those
    that say how strong it is. counts: the pipeline gives its scheduler the σ of all steps, of which
    this class takes the number and μ (`models.latent.count_steps`).
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    taken: Mapping[str, str] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    guidance: Mapping[str, Any] = field(default_factory=dict)
    counts: bool = False


def guidance_of(stock: StockSampler, config: Config, rows: int = 1) -> dict[str, Any]:
    """The arguments of a pipeline's call that say how strong guidance is.

    rows: prompts of the call; some pipelines want a text beside each.
    """
    found = dict(stock.guidance) or {"guidance_scale": config.sampling.guidance_scale}
    if rows == 1:
        return found
    return {
        key: [value] * rows if isinstance(value, str) else value for key, value in found.items()
    }


@dataclass(frozen=True)
class ExportForm:
    """How a trained model is written for other programs, and loaded again to prove it.

    write(policy, config, folder, name, stock): fills the folder of a model called `name`, drawn
    with `stock`. load(config, folder): a fresh pipeline from it. always: what was learned acts in
    all steps there, so that it is no form for a LoRA whose strength varies.
    """

    write: Callable[[Any, Config, Path, str, StockSampler], None]
    load: Callable[[Config, Path], Any]
    always: bool = False


@dataclass(frozen=True)
class Own:
    """What a world brings along: its reward, prompts and view, beside which there are no others.

    check_prompts raises ConfigError for a prompt that it does not know.
    """

    reward: Callable[[Config], NamedReward]
    prompts: Callable[[Config], PromptSet]
    check_prompts: Callable[[Config, Sequence[str]], None]
    view: Callable[[Config, KernelTable], View]


class OfDiffusers(Protocol):
    """What families of diffusers' pipelines share (`pipelines.PipelineFamily`), as others see it.

    lengths: prompts may have sampling.max_sequence_length tokens. recomputes_vae: its decoder can
    recompute its activations. deterministic: how diffusers draws with η = 0 on the pipeline's own
    grid.
    """

    @property
    def lengths(self) -> bool: ...

    @property
    def recomputes_vae(self) -> bool: ...

    @property
    def deterministic(self) -> StockSampler: ...

    @property
    def latent_model(self) -> type[LatentModel]: ...

    def ode_sampler(self, config: Config) -> StockSampler:
        """How diffusers draws without noise: for methods whose paths have none."""
        ...


def nothing(config: Config) -> None:
    """No option to refuse."""


@dataclass(frozen=True)
class Family:
    """A kind of model.

    claims: whether `pretrained.model` is of this family by its name alone. pipelines: the diffusers
    classes (of model_index.json) that are. check: raises ConfigError for options that it cannot
    have, before anything is loaded. load(config, device, shard): the policy; shard: spread over the
    processes. skeleton: the policy of the run's architecture without its weights, for counting;
    None where memory does not matter. lora_targets: endings of the names of its layers, by the
    words of model.lora_targets. export_forms: by name. no_export: why there are none.
    stock_sampler(config, times): how diffusers draws at the times of the run's steps; raises
    ConfigError when no scheduler does. small: whether it trains on a CPU. network: what is
    finetuned, in a word. of_diffusers: what it shares with all of diffusers' pipelines. own: for
    worlds.
    """

    name: str
    claims: Callable[[str], bool]
    load: Callable[[Config, torch.device, bool], Policy]
    pipelines: tuple[str, ...] = ()
    check: Callable[[Config], None] = nothing
    skeleton: Callable[[Config], LatentPolicy] | None = None
    lora_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    export_forms: Mapping[str, ExportForm] = field(default_factory=dict)
    no_export: str = ""
    stock_sampler: Callable[[Config, Sequence[float]], StockSampler] | None = None
    loading_code: Callable[[Config], list[str]] | None = None
    small: Callable[[str], bool] = lambda model: False
    network: str = "U-Net"
    of_diffusers: OfDiffusers | None = None
    own: Own | None = None
