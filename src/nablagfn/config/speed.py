"""How fast a run is."""

from __future__ import annotations

from pydantic import Field

from .base import Group


class Speed(Group):
    """How fast a run is, at the same mathematics: results change by rounding only. All are off,
    because what they gain on a GPU has not been measured (docs/performance.md).
    """

    compile: bool = Field(
        False,
        description="torch.compile for the U-Net and the VAE's decoder; the first update compiles "
        "for minutes",
    )
    compile_reward: bool = Field(
        False, description="torch.compile for the networks of the reward, if it has any"
    )
    cuda_graphs: bool = Field(
        False,
        description="CUDA graphs (torch.compile's reduce-overhead) for passes of the U-Net without "
        "gradient, those of sampling; needs a CUDA device",
    )
    channels_last: bool = Field(
        False, description="channels-last memory format for the U-Net and the VAE"
    )
    fused_optimizer: bool = Field(False, description="adamw in one kernel (torch's fused=True)")
    offload_text_encoder: bool = Field(
        False,
        description="the text encoder stays in the computer's memory while no new prompt is "
        "encoded; each prompt is encoded once",
    )
    offload_reward: bool = Field(
        False,
        description="the weights of the reward, and of held-out ones, stay in the computer's "
        "memory while no pictures are scored; each scoring copies them (each micro-batch or "
        "training.vae_slice)",
    )

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is at work."""
        return self.compile or self.compile_reward or self.cuda_graphs
