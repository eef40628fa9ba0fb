"""Train tiny-animals' U-Net and text encoder further, for a given time, from what is shipped.

    python continue_unet.py --pack .data/tiny-animals.zip --minutes 8 --out OUT [--resume FILE]

Needs the pack of drawings (``pack.py``) and the shipped pipeline, neither npm nor resvg. Loss,
captions, optimizer and averages are those of ``train_unet.py``; the pictures are encoded anew by
the shipped autoencoder, which stays as it is. Prints JSON lines. Writes to OUT:

* ``more.safetensors``, every 20 s and at the end: the averaged weights of both networks in half
  precision, as they are shipped, and the number of steps: 15.6 MB. ``--resume`` goes on from it;
  what it lacks is the optimizer's momentum (a memory of about 20 steps, built up again while the
  learning rate warms up over 100), the weights beside their average, and the place on the
  learning rate's cosine, which starts anew with each run.
* ``before-after.png``: each soft animal as shipped (left) and now (right), from the same noise.

``--state FILE`` also keeps everything in float32 (94 MB): run again with the same file, a run that
was interrupted goes on as if nothing had been, on a CPU bit for bit. The minutes hold for the
whole process, figures included. ``--minutes 0`` trains nothing: figures of ``--resume`` only.
``--pipeline FOLDER`` writes a pipeline with the new weights, for ``gate.py`` to judge. Nothing
here replaces what is shipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import data
import numpy as np
import psutil
import torch
from common import Average, Run, device_for, parser, to_images
from diffusers import StableDiffusionPipeline
from gate import draw, judge, load_pipeline, save_grid
from muon import Muon
from pack import load_pack
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from train_unet import Lessons, Policy, Tokens
from train_vae import mean_of

SHIPPED = Path(__file__).parents[2] / "src" / "nablagfn" / "assets" / "tiny-animals"
SHIPPED_STEPS = 2000  # what the shipped weights were trained for, see the model card
SOFT = ("horse", "whale", "rat", "bat", "monkey", "turkey")
STEPS = 20  # of sampling, for the figures
COLUMNS = 6  # pictures of each animal in the grid, before and after
TRIAL_SEED = 10_000  # of the batches that weights are compared on
BATCH = {"cuda": 384, "cpu": 96}


def write_weights(values: dict[str, Tensor], step: int, path: Path) -> None:
    """Write averaged weights in half precision beside the path, then move them there."""
    partial = path.with_suffix(".partial")
    half = {k: v.detach().half().cpu().contiguous() for k, v in values.items()}
    save_file(half, partial, metadata={"step": str(step)})
    os.replace(partial, path)


def read_weights(path: Path) -> tuple[dict[str, Tensor], int]:
    """Weights in float32 and their steps; SystemExit with one line for a file that is not whole."""
    try:
        with safe_open(path, "pt") as file:
            weights = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
            return weights, int(file.metadata()["step"])
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise SystemExit(f"{path}: no whole file of weights ({error})") from None


class Longer(Run):
    """A run that also writes its averaged weights small, and logs JSON."""

    every, talk = 20.0, 10.0

    def __init__(self, weights: Path, *args: Any, **options: Any) -> None:
        """``weights``: where the averaged weights go; the rest as for Run."""
        self.weights = weights
        super().__init__(*args, **options)

    def begin(self, seconds: float) -> None:
        """The clock starts now; there are so many seconds from here."""
        self.budget, self._last = self.elapsed + seconds, time.monotonic()

    def save(self) -> None:
        """Write the averaged weights, and the whole state where one is asked for."""
        write_weights(self.averages["policy"].values, self.step, self.weights)
        super().save()

    def log(self) -> None:
        """Print step, smoothed loss and seconds of training."""
        loss = round(self.losses["v"], 5) if self.losses else None
        line = {"step": self.step, "loss": loss, "seconds": round(self.elapsed, 1)}
        print(json.dumps(line), flush=True)


def measure(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, name: str
) -> tuple[Tensor, float]:
    """Print the gate's figures and each animal's share; pictures of the grid, seconds taken."""
    started, animals = time.monotonic(), data.ANIMAL_NAMES
    wanted = list(animals) * args.each
    prompts = [data.caption(animal) for animal in wanted]
    for guidance in args.guidance if args.each else ():
        images = draw(pipe, prompts, STEPS, guidance, seed=3)
        found = judge(images, SHIPPED, prompts, wanted, most=None)
        misses = found.pop("misses")
        found["animals"] = {a: round(1 - misses.get(a, 0) / args.each, 3) for a in animals}
        print(json.dumps({name: {"guidance": guidance, **found}}), flush=True)
    shown = [data.caption(animal) for animal in args.emphasis or SOFT for _ in range(COLUMNS)]
    pictures = draw(pipe, shown, STEPS, 2.0, seed=5) if args.each else torch.empty(0)
    return pictures, time.monotonic() - started


def save_both(before: Tensor, after: Tensor, path: Path) -> None:
    """Grid of pictures [N, 3, 64, 64]: a row for each animal, before, a gap, after."""
    rows = [x.unflatten(0, (-1, COLUMNS)) for x in (before, after)]
    gap = torch.ones_like(rows[0][:, :1])
    save_grid(torch.cat([rows[0], gap, rows[1]], 1).flatten(0, 1), 2 * COLUMNS + 1, path)


@torch.no_grad()
def lessons_of(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, until: float
) -> Lessons | None:
    """Composites of the pack, encoded by the autoencoder; None where that is not done in time."""
    drawings = data.on_canvases(load_pack(args.pack))
    composites = data.build(drawings, copies=8, at_random=False, seed=0)
    images, labels, device = composites.images, composites.labels(), pipe.device
    parts = []
    for i in range(0, len(images), 64):
        if time.monotonic() > until:
            return None
        parts.append(mean_of(pipe.vae, to_images(images[i : i + 64], device)))
    shares = None
    if args.emphasis:
        chosen = [data.ANIMAL_NAMES.index(animal) for animal in args.emphasis]
        weight = np.where(np.isin(labels[:, 0], chosen), args.weight, 1.0)
        shares = weight / weight.sum()
    tokens, alphas = Tokens(pipe.tokenizer), pipe.scheduler.alphas_cumprod
    return Lessons(torch.cat(parts), labels, tokens, alphas, shares)


def weights_of(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The pipeline's weights under the names that ``Policy`` has for them."""
    parts = {"text": pipe.text_encoder, "unet": pipe.unet}
    return {f"{p}.{k}": v for p, module in parts.items() for k, v in module.state_dict().items()}


def put_weights(pipe: StableDiffusionPipeline, weights: dict[str, Tensor]) -> None:
    """The inverse of ``weights_of``."""
    for part, module in (("text", pipe.text_encoder), ("unet", pipe.unet)):
        own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(part)}
        module.load_state_dict(own)


@torch.no_grad()
def trial(lessons: Lessons, policy: Policy, batch: int) -> float:
    """Loss on four batches that are the same each time, for weights to be compared."""
    losses = [float(lessons.loss(policy, step, TRIAL_SEED, batch)) for step in range(4)]
    return round(float(np.mean(losses)), 5)


def train(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, start: tuple[dict, int], until: float
) -> None:
    """Train from the weights and steps ``start`` to the time ``until`` (of time.monotonic)."""
    weights, device = args.out / "more.safetensors", pipe.device
    lessons = lessons_of(pipe, args, until)
    if lessons is None:
        print(json.dumps({"note": "no time left to train"}), flush=True)
        return write_weights(*start, weights)
    policy = Policy(pipe.tokenizer)
    policy.load_state_dict(start[0])
    policy.to(device, memory_format=torch.channels_last)
    batch = args.batch or BATCH[device.type]
    run = Longer(
        weights,
        args.state,
        {"policy": policy},
        Muon(policy.parameters(), lr=args.lr),
        {"policy": Average(policy, 0.9995)},
        minutes=0,
        first=start[1],
    )
    began = time.monotonic()
    line = {"from": run.step, "batch": batch, "loss_on_trial": trial(lessons, policy, batch)}
    seconds = until - 2 * time.monotonic() + began  # the trial comes again at the end
    run.begin(seconds)
    print(json.dumps({**line, "seconds": round(max(0.0, seconds), 1)}), flush=True)
    for step in run.steps():
        loss = lessons.loss(policy, step, args.seed, batch)
        run.update(loss, {"v": loss})
    run.log()
    policy.load_state_dict(run.averages["policy"].values)
    line = {"to": run.step, "loss_on_trial": trial(lessons, policy, batch)}
    print(json.dumps(line), flush=True)


def write_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """The shipped folder with the pipeline's text encoder and U-Net, in the shipped precision."""
    shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
    pipe.text_encoder.save_pretrained(folder / "text_encoder")
    copy.deepcopy(pipe.unet).half().save_pretrained(folder / "unet")


def options() -> argparse.ArgumentParser:
    """The command line."""
    p = parser(__doc__, minutes=8, lr=1e-3, batch=0, work=False)
    p.add_argument("--pack", type=Path, default=Path(".data/tiny-animals.zip"), help="of pack.py")
    p.add_argument("--out", type=Path, required=True, help="folder of weights and grid")
    p.add_argument("--resume", type=Path, help="more.safetensors of an earlier run")
    p.add_argument("--state", type=Path, help="float32 checkpoint, gone on from where it is there")
    p.add_argument("--pipeline", type=Path, help="folder for a pipeline with the new weights")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    p.add_argument("--emphasis", nargs="*", default=[], choices=data.ANIMAL_NAMES, metavar="ANIMAL")
    p.add_argument("--weight", type=float, default=2.0, help="how often these, others once")
    p.add_argument("--each", type=int, default=10, help="judged samples per animal; 0: no figures")
    p.add_argument("--guidance", type=float, nargs="*", default=[1.0, 2.0])
    return p


def main(argv: list[str] | None = None, age: float = 0.0) -> None:
    """Measure, train, measure, in the given minutes, ``age`` seconds of which are gone already."""
    p = options()
    args = p.parse_args(argv)
    if args.minutes and not args.pack.is_file():
        p.error(f"--pack: there is no {args.pack}; pack.py writes it")
    deadline = time.monotonic() - age + 60 * args.minutes
    start = read_weights(args.resume) if args.resume else None
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(SHIPPED, device_for(args.threads, args.device))
    before, seconds = measure(pipe, args, "shipped")
    start = start or (weights_of(pipe), SHIPPED_STEPS)
    if args.minutes:
        train(pipe, args, start, until=deadline - 1.3 * seconds - 3)
        start = read_weights(args.out / "more.safetensors")
    put_weights(pipe, start[0])
    if args.pipeline:
        write_pipeline(pipe, args.pipeline)
    if args.each and (not args.minutes or time.monotonic() + seconds < deadline):
        after, _ = measure(pipe, args, "now")
        save_both(before, after, args.out / "before-after.png")
    left = round(deadline - time.monotonic(), 1) if args.minutes else None
    print(json.dumps({"step": start[1], "seconds_left": left}), flush=True)


if __name__ == "__main__":
    main(age=time.time() - psutil.Process().create_time())
