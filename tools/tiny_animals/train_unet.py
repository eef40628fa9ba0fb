"""Train tiny-animals' text encoder and U-Net on cached latents (v-prediction).

The tokenizer is a CLIPTokenizer with its own small vocabulary: all bytes, and merges that make
each word of the captions one token, so that unknown words still tokenise.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
from common import Average, Run, device_for, parser, save_atomic, to_images
from diffusers import DDIMScheduler, UNet2DConditionModel
from muon import Muon
from torch import Tensor, nn
from train_vae import CHANNELS, mean_of
from train_vae import build as build_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 16  # tokens of a prompt
WIDTH = 128  # of the text encoder
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (
    "a",
    "an",
    "on",
    "background",
    *data.ANIMAL_NAMES,
    *data.STYLE_NAMES,
    *data.BACKGROUND_NAMES,
)


def byte_alphabet() -> list[str]:
    """The printable characters that stand for the 256 bytes in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def merged(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges to the symbols of one word, best rank first."""
    while len(symbols) > 1:
        pairs = [
            (ranks.get((a, b), len(ranks)), i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
        ]
        rank, i = min(pairs)
        if rank == len(ranks):
            break
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
    return symbols


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer: each of WORDS is one token, other words fall apart into pieces."""
    ranks: dict[tuple[str, str], int] = {}
    for word in WORDS:
        symbols = merged([*word[:-1], word[-1] + "</w>"], ranks)
        while len(symbols) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    alphabet = byte_alphabet()
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in ranks)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    return CLIPTokenizer(vocab=vocab, merges=list(ranks), model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text model, two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """The U-Net: 8x8 and 4x4, self- and cross-attention in every block."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(96, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Noise schedule and default sampler."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="leading",
    )


@torch.no_grad()
def latents(work: Path, device: torch.device) -> np.ndarray:
    """The composites' latents float32 [N, 16, 8, 8] (cached)."""
    path = work / "latents.npy"
    if path.exists():
        return np.load(path)
    images = data.load(work / "data" / "modes").images
    vae = build_vae().to(device)
    vae.load_state_dict(torch.load(work / "vae.pt", map_location=device, weights_only=True))
    parts = [mean_of(vae, to_images(images[i : i + 64], device)) for i in range(0, len(images), 64)]
    result = torch.cat(parts).cpu().numpy()
    partial = path.with_suffix(".partial.npy")
    np.save(partial, result)
    os.replace(partial, path)
    return result


class Tokens:
    """Token ids of captions, remembered."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, captions: list[str]) -> Tensor:
        """Ids [B, LENGTH]."""
        for text in captions:
            if text not in self.known:
                found = self.tokenizer(
                    text, padding="max_length", max_length=LENGTH, truncation=True
                )
                self.known[text] = found.input_ids
        return torch.tensor([self.known[text] for text in captions])


class Policy(nn.Module):
    """Text encoder and U-Net as one module."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text, self.unet = build_text_encoder(tokenizer), build_unet()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predicted v [B, 16, 8, 8]."""
        return self.unet(
            x.contiguous(memory_format=torch.channels_last), t, self.text(ids).last_hidden_state
        ).sample


class IdealDenoiser:
    """The exact mean of x0 given x_t and the caption, over the finite set of latents.

    As a target it has no sampling noise, unlike the x0 that a picture happened to have, so that
    the U-Net learns its modes in their right proportions from far fewer steps.
    """

    def __init__(self, z0: Tensor, labels: np.ndarray) -> None:
        self.z0, self.square = z0.flatten(1), z0.flatten(1).square().sum(1)
        self.labels = labels  # on the CPU, so that a GPU is asked for nothing caption by caption
        self.rows = {a: np.flatnonzero(labels[:, 0] == a) for a in range(len(data.ANIMALS))}
        self.rows[-1] = np.arange(len(z0))
        self.on_device = {k: torch.from_numpy(r).to(z0.device) for k, r in self.rows.items()}

    def _allowed(self, rows: np.ndarray, captions: list[str], labels: np.ndarray) -> Tensor:
        """Whether each of the rows fits each caption: bool [B, R]."""
        fits = np.ones((len(captions), len(rows)), dtype=bool)
        for i, text in enumerate(captions):
            words = set(text.split())
            for column, names in ((1, data.STYLE_NAMES), (2, data.BACKGROUND_NAMES)):
                if words & set(names):
                    fits[i] &= self.labels[rows, column] == labels[i, column]
        return torch.from_numpy(fits)

    def __call__(
        self, x: Tensor, signal: Tensor, noise: Tensor, captions: list[str], pick: np.ndarray
    ) -> Tensor:
        """Mean x0 [B, 16, 8, 8] for x_t = signal * x0 + noise * e, of the pictures ``pick``."""
        labels, flat = self.labels[pick], x.flatten(1)
        signal, noise, out = signal.flatten(1), noise.flatten(1), torch.empty_like(flat)
        keys = [int(a) if c else -1 for a, c in zip(labels[:, 0], captions, strict=True)]
        for key in set(keys):
            members = [i for i, k in enumerate(keys) if k == key]
            rows, a = self.on_device[key], signal[members]
            z = self.z0[rows]
            logits = (a * (flat[members] @ z.T) - a**2 / 2 * self.square[rows]) / noise[
                members
            ] ** 2
            texts = [captions[i] for i in members]
            fits = self._allowed(self.rows[key], texts, labels[members]).to(x.device)
            out[members] = logits.masked_fill(~fits, -torch.inf).softmax(1) @ z
        return out.view_as(x)


class Lessons:
    """The training's batches and loss; step and seed decide everything that is drawn."""

    def __init__(
        self,
        z0: Tensor,
        labels: np.ndarray,
        tokens: Tokens,
        alphas: Tensor,
        shares: np.ndarray | None = None,
    ) -> None:
        """z0 [N, 16, 8, 8], labels [N, 3], alphas [T]; shares [N]: how often each is drawn.

        With ``shares`` pictures are drawn more or less often; what is right for a noisy latent and
        its caption, the mean over all pictures that the caption allows, stays what it is.
        """
        self.z0, self.labels, self.tokens, self.shares = z0, labels, tokens, shares
        self.ideal, self.alphas = IdealDenoiser(z0, labels), alphas.to(z0.device)

    def loss(self, policy: nn.Module, step: int, seed: int, batch: int) -> Tensor:
        """Mean squared error of v, a scalar."""
        z0, device = self.z0, self.z0.device
        rng = np.random.default_rng((seed + 2, step))
        torch.manual_seed(seed * 1_000_003 + step)
        if self.shares is None:
            pick = rng.integers(len(z0), size=batch)
        else:
            pick = rng.choice(len(z0), size=batch, p=self.shares)
        captions = [data.random_caption(*self.labels[i].tolist(), rng) for i in pick]
        ids, rows = self.tokens(captions).to(device), torch.from_numpy(pick).to(device)
        t = (1000 * torch.rand(batch, device=device).sqrt()).long()  # density rises with t
        signal = self.alphas[t].sqrt()[:, None, None, None]
        noise_level = (1 - self.alphas[t]).sqrt()[:, None, None, None]
        x = signal * z0[rows] + noise_level * torch.randn_like(z0[rows])
        x0 = self.ideal(x, signal, noise_level, captions, pick)
        wanted = (signal * x - x0) / noise_level  # v = signal * e - noise_level * x0
        return F.mse_loss(policy(x, t, ids), wanted)


def main() -> None:
    """Train; writes ``policy.pt`` (averaged weights) every 500 steps and at the end."""
    p = parser(__doc__, minutes=60, lr=2e-3, batch=96)
    args = p.parse_args()
    device = device_for(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    tokens, policy = (
        Tokens(tokenizer),
        Policy(tokenizer).to(device, memory_format=torch.channels_last),
    )
    labels = data.load(args.work / "data" / "modes").labels()
    z0 = torch.from_numpy(latents(args.work, device)).to(device)
    lessons = Lessons(z0, labels, tokens, build_scheduler().alphas_cumprod)
    average = Average(policy, 0.9995)
    optimizer = Muon(policy.parameters(), lr=args.lr)
    run = Run(
        args.work / "policy.ckpt", {"policy": policy}, optimizer, {"policy": average}, args.minutes
    )
    for step in run.steps():
        loss = lessons.loss(policy, step, args.seed, args.batch)
        run.update(loss, {"v": loss})
        if step % 500 == 499:
            save_atomic(average.values, args.work / "policy.pt")
    save_atomic(average.values, args.work / "policy.pt")


if __name__ == "__main__":
    main()
