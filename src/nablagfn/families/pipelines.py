"""What families of diffusers' pipelines share: loading, counting, exporting, the printed program.

A family is told apart by its `LatentModel` (a name, imported when it is needed), its pipelines, its
LoRA targets and its stock sampler. Needs no torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config, ConfigError
from ..models.locate import EMBEDDED, check_unet, locate, missing_parts
from ..models.lora import FIRST_STATE
from .family import ExportForm, Family, StockSampler

if TYPE_CHECKING:
    import torch

    from ..core.types import Policy
    from ..models.latent import LatentPolicy
    from ..models.latent_model import LatentModel

UNET_WORD = "U-Net"
AS_IT_IS = StockSampler("")  # the pipeline's own scheduler
Stock = Callable[[Config, Sequence[float]], StockSampler]


@dataclass(frozen=True)
class PipelineFamily:
    """What is true of a family without its weights.

    model: "module:class" of its `LatentModel`. pipelines: diffusers' classes; the first is loaded.
    lora_targets: endings of layer names by the words of model.lora_targets. names: hub names and
    embedded ones that are known to be of it; distilled: those of them that draw in a few steps.
    stock: how diffusers draws as a run does. deterministic: how it draws with η = 0 on the
    pipeline's own grid; by its own scheduler where no other is named. network: what is finetuned,
    in a word. kohya: the keys of kohya-ss are an export's form of their own (other programs read
    diffusers' keys). recomputes_vae: its decoder can recompute its activations. compiles: its
    network sees few shapes, whatever the prompts. lengths: prompts may have
    sampling.max_sequence_length tokens, most_tokens at most (0: any). loading: further arguments
    of from_pretrained, of an embedded model, as they are printed.
    """

    name: str
    model: str
    pipelines: tuple[str, ...]
    lora_targets: Mapping[str, tuple[str, ...]]
    stock: Stock
    deterministic: StockSampler = AS_IT_IS
    names: tuple[str, ...] = ()
    distilled: frozenset[str] = frozenset()
    network: str = "transformer"
    kohya: bool = False
    lengths: bool = True
    most_tokens: int = 0
    recomputes_vae: bool = True
    compiles: bool = True
    loading: str = ""

    @property
    def latent_model(self) -> type[LatentModel]:
        from ..models.latent import quiet

        module, _, name = self.model.partition(":")
        with quiet():  # some parts of pipelines that are not used here tell what they lack
            found: type[LatentModel] = getattr(importlib.import_module(module), name)
        return found

    def family(self) -> Family:
        """The family's record."""
        forms = {
            "diffusers": ExportForm(_write_diffusers, self.with_lora),
            "kohya": ExportForm(write_kohya, self.with_lora),
            "fused": ExportForm(self.write_fused, self.load_fused, always=True),
        }
        if not self.kohya:
            del forms["kohya"]
        return Family(
            self.name,
            claims=lambda model: model in self.names,
            load=self.load,
            pipelines=self.pipelines,
            check=self.check,
            skeleton=self.skeleton,
            lora_targets=self.lora_targets,
            export_forms=forms,
            stock_sampler=self.stock_sampler,
            loading_code=self.loading_code,
            small=lambda model: model in EMBEDDED,
            network=self.network,
            of_diffusers=self,
        )

    def check(self, config: Config) -> None:
        """Raises ConfigError when the model is not there or not of this family, and for options
        that exclude each other."""
        check_lora_strength(config)
        if not self.compiles:
            check_not_compiled(config, self.name)
        if config.sampling.max_sequence_length and not self.lengths:
            raise ConfigError(
                f"config.sampling.max_sequence_length={config.sampling.max_sequence_length}: the "
                f"prompts of a {self.name} model all have the length of its tokenizer: set it to 0"
            )
        asked = config.sampling.max_sequence_length
        if self.most_tokens and asked > self.most_tokens:
            raise ConfigError(
                f"config.sampling.max_sequence_length={asked}: the pipeline of a {self.name} model "
                f"takes {self.most_tokens} at most"
            )
        if self.network != UNET_WORD and config.training.mixed_precision == "fp16":
            raise ConfigError(
                "config.training.mixed_precision=fp16: a transformer or its text encoder leaves "
                f"the range of float16 ({self.name}): take bf16"
            )
        if config.training.vae_checkpointing and not self.recomputes_vae:
            raise ConfigError(
                "config.training.vae_checkpointing=True: the autoencoder of a "
                f"{self.name} model has none: set it to False, and training.vae_slice=1 saves "
                "memory"
            )
        model, revision = config.pretrained.model, config.pretrained.revision
        source = locate(model, revision)
        if self.network == UNET_WORD:
            check_unet(model, source, revision)

    # ------------------------------------------------------------ the model

    def load(self, config: Config, device: torch.device, shard: bool) -> Policy:
        """The policy of a run, its weights on `device`."""
        from ..models.latent_model import PipelineCall
        from ..models.load import policy_of
        from ..models.tune import tune
        from ..runtime.distributed import weight_dtype

        policy = policy_of(
            self.latent_model,
            config.pretrained.model,
            PipelineCall.of(config),
            revision=config.pretrained.revision,
            dtype=weight_dtype(config, device),
            device=device,
            shard=shard,
            offload=config.speed.offload_text_encoder,
            gradient_checkpointing=config.training.gradient_checkpointing,
            vae_checkpointing=config.training.vae_checkpointing,
            vae_slice=config.training.vae_slice,
            seed=config.seed,
            **_lora(config),
        )
        tune(policy, config.speed)
        if config.pretrained.model in self.distilled or policy.model.distilled:
            tell_distilled(config.pretrained.model)
        return policy

    def skeleton(self, config: Config) -> LatentPolicy:
        """The same without weights, on torch's present device."""
        from ..models.architectures import by_configuration
        from ..models.latent import LatentPolicy
        from ..models.latent_model import PipelineCall

        kind, given = self.latent_model, config.pretrained
        pipeline = by_configuration(kind, given.model, given.revision)
        return LatentPolicy(
            kind(pipeline, PipelineCall.of(config)),
            vae_checkpointing=config.training.vae_checkpointing,
            **_lora(config),
        )

    # ------------------------------------------------------------ what diffusers does

    def stock_sampler(self, config: Config, times: Sequence[float] = ()) -> StockSampler:
        """times: of the run's steps. Raises ConfigError for a sampler that no scheduler is."""
        if config.sampling.final_sigma:
            raise ConfigError(
                "no scheduler of diffusers ends at config.sampling.final_sigma="
                f"{config.sampling.final_sigma:g}: use `nablagfn sample`"
            )
        return self._called(self.stock(config, times), config)

    def ode_sampler(self, config: Config) -> StockSampler:
        """How diffusers draws without noise: for methods whose paths have none."""
        found, own = self.deterministic, self.stock(config, ())
        call = {**own.call, **found.call}
        return self._called(replace(found, guidance=own.guidance, call=call), config)

    @staticmethod
    def _called(found: StockSampler, config: Config) -> StockSampler:
        """With the sizes that the run asks for."""
        s = config.sampling
        shape = {"height": s.height, "width": s.width, "max_sequence_length": s.max_sequence_length}
        given = {name: value for name, value in shape.items() if value}
        return replace(found, call={**found.call, **given})

    def loading_code(self, config: Config) -> list[str]:
        """Lines that make `pipe`, the pretrained model."""
        name, revision = config.pretrained.model, config.pretrained.revision
        kind = self.pipelines[0]
        if name in EMBEDDED:
            return [
                "from nablagfn.models.locate import locate",
                f"pipe = {kind}.from_pretrained(",
                f"    locate({name!r}){self.loading})",
            ]
        given = "" if revision == "main" else f", revision={revision!r}"
        folder = os.path.expanduser(name)
        absent = missing_parts(folder) if os.path.isdir(folder) else []
        given += "".join(f", {part}=None" for part in absent)
        return [f"pipe = {kind}.from_pretrained({name!r}{given})"]

    # ------------------------------------------------------------ forms of an export

    def _pipeline(self, model: str, revision: str = "main") -> Any:
        from ..models.load import load_pipeline

        return load_pipeline(self.latent_model.pipeline_class, model, revision)

    def with_lora(self, config: Config, folder: Path) -> Any:
        """A fresh pipeline with the LoRA in `folder`."""
        (weights,) = (file for file in folder.glob("*.safetensors") if file.name != FIRST_STATE)
        pipeline = self._pipeline(config.pretrained.model, config.pretrained.revision)
        pipeline.load_lora_weights(folder, weight_name=weights.name)
        return pipeline

    def write_fused(
        self, policy: LatentPolicy, config: Config, folder: Path, name: str, stock: StockSampler
    ) -> None:
        """The whole pipeline, the LoRA added to its weights, with the run's sampler, or with its
        own where the pipeline does not take that one as it is."""
        from ..models.latent import set_sampler

        with tempfile.TemporaryDirectory() as lora:
            policy.save(Path(lora))
            pipeline = self.with_lora(config, Path(lora))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        if not stock.counts:
            set_sampler(pipeline, stock.scheduler, stock.options, stock.taken)
        pipeline.save_pretrained(folder)

    def load_fused(self, config: Config, folder: Path) -> Any:
        return self._pipeline(str(folder))


def _lora(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "lora_rank": model.lora_rank,
        "lora_targets": model.lora_targets,
        "lora_until": model.lora_until,
        "lora_fade": model.lora_fade,
    }


def check_not_compiled(config: Config, family: str) -> None:
    """Raises ConfigError where a network would be compiled anew for every length of a prompt."""
    for key in ("compile", "cuda_graphs"):
        if getattr(config.speed, key):
            raise ConfigError(
                f"config.speed.{key}=True: the network of a {family} model is given each prompt at "
                "its own length, and would be compiled for each: leave it out"
            )


@functools.cache
def tell_distilled(model: str) -> None:
    """Say once what it means to finetune a model that draws in a few steps."""
    from ..runs.progress import note
    from ..runtime.distributed import process_state

    if process_state().is_main_process:
        note(
            f"{model} is distilled to draw in a few steps, and they do not reverse a noising "
            "process: p is what this run's own chain of steps draws, and training without the loss "
            "of the distillation can blur the pictures or undo it; take "
            "config.sampling.guidance_scale=1, or finetune the model that it was distilled from"
        )


def check_lora_strength(config: Config) -> None:
    """Raises ConfigError where a pass could not tell how strongly the LoRA acts on its rows."""
    varies = config.model.lora_variation
    if not varies:
        return
    for key, on in (
        ("training.gradient_checkpointing", config.training.gradient_checkpointing),
        ("speed.compile", config.speed.compile),
        ("speed.cuda_graphs", config.speed.cuda_graphs),
    ):
        if on:
            raise ConfigError(f"{varies} does not go with config.{key}=True: set one of them back")


def _write_diffusers(
    policy: LatentPolicy, config: Config, folder: Path, name: str, stock: StockSampler
) -> None:
    policy.model.save(folder, policy.lora())


def write_kohya(
    policy: LatentPolicy, config: Config, folder: Path, name: str, stock: StockSampler
) -> None:
    """lora_unet_….lora_down, .lora_up and .alpha, the keys of ComfyUI and AUTOMATIC1111."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    named = {f"unet.{key}": value.detach().cpu() for key, value in policy.lora().items()}
    converted = convert_state_dict_to_kohya(named)
    plain = {key: value.float().contiguous() for key, value in converted.items()}
    save_file(plain, folder / f"{name}.safetensors")


def flow_stock(config: Config, times: Sequence[float] = ()) -> StockSampler:
    """First-order SDE-DPM-Solver++ on α = 1 − σ, which is the posterior step of this package.

    It ends at the predicted clean sample, where a run keeps σ = 0.03 of noise, and its steps are
    equal ones from σ = 0.999 of the time before the shift, which the network is told in whole
    thousandths. Raises ConfigError for other steps.
    """
    sampling = config.sampling
    if sampling.spacing != "leading":
        raise ConfigError(
            f"no scheduler of diffusers has the steps of config.sampling.spacing={sampling.spacing}"
            " for a flow model: use `nablagfn sample`"
        )
    if sampling.scheduler not in ("ddim", "ddpm", "dpm-solver"):
        raise ConfigError(
            "no scheduler of diffusers draws as config.sampling.scheduler="
            f"{sampling.scheduler!r} does: use `nablagfn sample`"
        )
    if sampling.scheduler == "ddim" and sampling.eta != 1:
        raise ConfigError(
            f"no scheduler of diffusers draws with config.sampling.eta={sampling.eta:g} on a flow "
            "model: use `nablagfn sample`"
        )
    return StockSampler(
        "DPMSolverMultistepScheduler",
        {
            "algorithm_type": "sde-dpmsolver++",
            "solver_order": 1,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "final_sigmas_type": "zero",
        },
        taken={"flow_shift": "shift"},
    )
