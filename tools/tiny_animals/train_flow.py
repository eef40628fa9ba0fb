"""Train tiny-animals-flow: a small MM-DiT by rectified flow, on the pictures of tiny-animals.

    python train_flow.py --pack .data/tiny-animals.zip --work WORK

The autoencoder and the text encoder are those that ship with tiny-animals, frozen; captions are
encoded once, as a ``StableDiffusion3Pipeline`` encodes them. Where such a pipeline has no T5 it
gives the network up to 256 tokens that are zero. They are alike in every layer, so one of them,
whose attention logits are raised by log n, is n of them exactly: the network is trained with n = 1
and n = 256 at the price of one, and draws with any ``max_sequence_length``.

The target is v = (x − x̂)/σ with the exact posterior mean x̂ over the finite set of pictures. Writes
``flow.pt`` (averaged weights) to the work folder; a run that was interrupted goes on.
"""

from __future__ import annotations

import os
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
from common import Average, Run, device_for, parser, save_atomic, to_images
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from muon import Muon
from pack import load_pack
from torch import Tensor, nn
from train_unet import LENGTH, WIDTH, IdealDenoiser
from train_vae import CHANNELS, mean_of
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SHIPPED = Path(__file__).parents[2] / "src" / "nablagfn" / "assets" / "tiny-animals"
SHIFT = 3.0  # of σ, as SD3's: flat backgrounds are decided early
EMPTY = (1, 256)  # how many zero tokens there may be
LEAST_SIGMA = 1e-3


def build_transformer() -> SD3Transformer2DModel:
    """The network: SD3.5's architecture, four blocks of width 128, each latent pixel a token."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def build_text_encoder(shipped: Path = SHIPPED) -> CLIPTextModelWithProjection:
    """The shipped text encoder, with a projection that changes nothing."""
    plain = CLIPTextModel.from_pretrained(shipped / "text_encoder", dtype=torch.float32)
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**plain.config.to_dict()))
    own = encoder.state_dict()
    given = plain.state_dict()
    for name in own:
        found = [key for key in given if name.endswith(key)]
        if found:
            own[name] = given[found[0]]
    own["text_projection.weight"] = torch.eye(WIDTH)
    encoder.load_state_dict(own)
    return encoder.requires_grad_(False).eval()


class Captions:
    """All K captions: hidden [K, LENGTH + 1, 2·WIDTH] with one zero token, pooled [K, 2·WIDTH]."""

    def __init__(self, device: torch.device) -> None:
        styles, backgrounds = (None, *data.STYLE_NAMES), (None, *data.BACKGROUND_NAMES)
        texts = ["", *data.ANIMAL_NAMES]
        for animal in data.ANIMAL_NAMES:
            texts += [data.caption(animal, s, b) for s in styles for b in backgrounds]
        self.number = {text: i for i, text in enumerate(texts)}
        hidden, pooled = self._encode(texts)
        self.hidden = F.pad(torch.cat([hidden, hidden], -1), (0, 0, 0, 1)).to(device)
        self.pooled = torch.cat([pooled, pooled], -1).to(device)

    @staticmethod
    @torch.no_grad()
    def _encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
        encoder = build_text_encoder()
        ids = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
        found = encoder(ids.input_ids, output_hidden_states=True)
        return found.hidden_states[-2], found.text_embeds

    def __call__(self, texts: list[str]) -> Tensor:
        """Row numbers [B]."""
        return torch.tensor([self.number[text] for text in texts], device=self.hidden.device)


class Counted:
    """diffusers' joint attention where the last token stands for n of its kind, [B]."""

    def __init__(self) -> None:
        self.count: Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        x, text, heads = hidden_states, encoder_hidden_states, attn.heads

        def split(value: Tensor) -> Tensor:
            return value.unflatten(-1, (heads, -1)).transpose(1, 2)

        q = torch.cat(
            [attn.norm_q(split(attn.to_q(x))), attn.norm_added_q(split(attn.add_q_proj(text)))], 2
        )
        k = torch.cat(
            [attn.norm_k(split(attn.to_k(x))), attn.norm_added_k(split(attn.add_k_proj(text)))], 2
        )
        v = torch.cat([split(attn.to_v(x)), split(attn.add_v_proj(text))], 2)
        more = torch.zeros(len(x), 1, 1, k.shape[2], device=x.device)
        more[..., -1] = self.count.log().reshape(-1, 1, 1)
        found = F.scaled_dot_product_attention(q, k, v, more).transpose(1, 2).flatten(2)
        here, there = found[:, : x.shape[1]], found[:, x.shape[1] :]
        if not attn.context_pre_only:
            there = attn.to_add_out(there)
        return attn.to_out[0](here), there


def zero_start(network: SD3Transformer2DModel) -> None:
    """Blocks that change nothing and an output of zero (adaLN-Zero; Peebles & Xie 2023)."""
    for block in network.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for layer in (network.norm_out.linear, network.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class FlowLessons:
    """The training's batches and loss; step and seed decide everything that is drawn."""

    def __init__(self, z0: Tensor, labels: np.ndarray, captions: Captions) -> None:
        """z0 [N, 16, 8, 8], labels [N, 3]."""
        self.z0, self.labels, self.captions = z0, labels, captions
        self.ideal = IdealDenoiser(z0, labels)

    def loss(
        self, network: SD3Transformer2DModel, counted: Counted, step: int, seed: int, batch: int
    ) -> Tensor:
        """Mean squared error of v = ε − x, a scalar."""
        device = self.z0.device
        rng = np.random.default_rng((seed + 7, step))
        torch.manual_seed(seed * 1_000_003 + step)
        pick = rng.integers(len(self.z0), size=batch)
        texts = [data.random_caption(*self.labels[i].tolist(), rng) for i in pick]
        counted.count = torch.from_numpy(rng.choice(EMPTY, size=batch)).float().to(device)
        row, x0 = self.captions(texts), self.z0[torch.from_numpy(pick).to(device)]
        u = torch.rand(batch, 1, 1, 1, device=device)
        sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(min=LEAST_SIGMA)
        x = (1 - sigma) * x0 + sigma * torch.randn_like(x0)
        wanted = (x - self.ideal(x, 1 - sigma, sigma, texts, pick)) / sigma
        found = network(
            x,
            timestep=1000 * sigma.flatten(),
            encoder_hidden_states=self.captions.hidden[row],
            pooled_projections=self.captions.pooled[row],
            return_dict=False,
        )[0]
        return F.mse_loss(found, wanted)


@torch.no_grad()
def latents_of(pack: Path, work: Path, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """The composites' latents [N, 16, 8, 8] by the shipped autoencoder (kept), and their labels."""
    composites = data.build(data.on_canvases(load_pack(pack)), copies=8, at_random=False, seed=0)
    path = work / "flow-latents.npy"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(SHIPPED / "vae", dtype=torch.float32).to(device)
        images = composites.images
        parts = [
            mean_of(vae, to_images(images[i : i + 64], device)) for i in range(0, len(images), 64)
        ]
        partial = path.with_suffix(".partial.npy")
        np.save(partial, torch.cat(parts).cpu().numpy())
        os.replace(partial, path)
    return torch.from_numpy(np.load(path)).to(device), composites.labels()


def main() -> None:
    """Train; writes ``flow.pt`` (averaged weights) every 200 steps and at the end."""
    p = parser(__doc__, minutes=110, lr=2e-3, batch=96)
    p.add_argument("--pack", type=Path, required=True, help="the drawings (pack.py)")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = device_for(args.threads)
    z0, labels = latents_of(args.pack, args.work, device)
    torch.manual_seed(args.seed)
    network, counted = build_transformer(), Counted()
    zero_start(network)
    network.to(device).set_attn_processor(counted)
    lessons = FlowLessons(z0, labels, Captions(device))
    average = Average(network, 0.9995)
    run = Run(
        args.work / "flow.ckpt",
        {"flow": network},
        Muon(network.parameters(), lr=args.lr),
        {"flow": average},
        args.minutes,
    )
    for step in run.steps():
        loss = lessons.loss(network, counted, step, args.seed, args.batch)
        run.update(loss, {"v": loss})
        if step % 200 == 199:
            save_atomic(average.values, args.work / "flow.pt")
    save_atomic(average.values, args.work / "flow.pt")


if __name__ == "__main__":
    main()
