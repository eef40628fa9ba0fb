"""The certificate in every exact world, where the truth is known: docs/certificate.md.

    python tools/certify.py --out runs/certify          # an hour on one core

Three models of each world, trained by `nablagfn train`: long, short by the published method, short
by another. `nablagfn evaluate` measures each on 4,000 samples a prompt; the truth is
log Z − E[log w] of 256,000 other paths a prompt, log Z of a million samples of the pretrained one.
KL(p*‖p_θ) is E[exp(βr)·log w]/Z − log Z of as many other paths of the pretrained one.
Finished runs are kept, and the page is written after each model.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from nablagfn.cli import main as nablagfn
from nablagfn.commands.assemble import build_policy
from nablagfn.commands.evaluate import EvaluationRequest, evaluate
from nablagfn.core import rng
from nablagfn.core.kernels import KernelTable
from nablagfn.core.path_kl import log_weight, path_ratio
from nablagfn.evaluation import draw_paths
from nablagfn.evaluation.certificate import ENDS, Bootstrap
from nablagfn.evaluation.resampling import base_paths, chosen_rows, weights_of_both
from nablagfn.evaluation.two_samplers import TwoSamplers
from nablagfn.methods.build import build_kernel
from nablagfn.metrics.intervals import Interval
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.checkpoint import load_policy
from nablagfn.worlds.measure import distances
from nablagfn.worlds.mixture import Mixture, Quadratic
from nablagfn.worlds.policy import WorldPolicy
from nablagfn.worlds.target import Target, gaussian_chain
from nablagfn.worlds.world import World

WORLDS = ("gaussian", "ring", "ring-quadratic", "ring-flow", "mixture-16d", "prompts")
PATHS = (4, 16)  # for each resampled sample
BASE = 1_000_000  # samples of the pretrained sampler
FRESH, SEED = 256_000, 12_345  # paths of the truth, and their seed
CHUNK = 4_000
SHOWN = 4  # sets of CHUNK kept samples
EXACT = 12  # sets of exact samples
SETS = FRESH // CHUNK  # how often an interval holds the truth
KLS = ("kl_to_target", "kl_from_target")
PUBLISHED = {"experiment.method": "nabla-db", "model.reward_adaptive_mode": "squared"}


@dataclass(frozen=True)
class Model:
    """A way to train in a world."""

    name: str
    updates: int
    options: tuple[tuple[str, object], ...] = ()

    @property
    def plain(self) -> str:
        """Its name as part of a path."""
        return "".join(c if c.isascii() and c.isalnum() else "-" for c in self.name)


MODELS = (
    Model("∇-DB(λ), 300 updates", 300),
    Model("residual ∇-DB, 100 updates", 100, tuple(PUBLISHED.items())),
    Model("Adjoint Matching, 100 updates", 100, (("experiment.method", "adjoint-matching"),)),
)


@dataclass(frozen=True)
class Truth:
    """A value, and the standard error of the samples that it is from."""

    value: float
    error: float

    @staticmethod
    def mean(parts: Sequence[Truth]) -> Truth:
        error = sum(part.error**2 for part in parts) ** 0.5
        return Truth(sum(part.value for part in parts) / len(parts), error / len(parts))


@dataclass(frozen=True)
class Found:
    """A figure of the certificate and what it is in truth. held: of SETS further ones, how many
    have intervals that hold the truth."""

    value: float
    low: float | None
    high: float | None
    truth: Truth
    held: int

    @staticmethod
    def read(record: dict[str, Any]) -> Found:
        return Found(**{**record, "truth": Truth(**record["truth"])})

    @property
    def holds(self) -> bool:
        return holds(Interval(self.value, self.low, self.high), self.truth)

    @property
    def cells(self) -> str:
        """With its interval where it has one; and the truth."""
        ends = "" if self.low is None else f" ({self.low:.3f}…{self.high:.3f})"
        outside = "" if self.holds else " (outside)"
        truth = f"{self.truth.value:.3f} ± {self.truth.error:.3f}{outside}"
        return f"{self.value:.3f}{ends} | {truth} | {self.held} of {SETS}"


@dataclass(frozen=True)
class Row:
    """What was found of one model. to, of: KL(p_θ‖p*) and KL(p*‖p_θ). modes, mmd: KL of the modes
    and MMD², in units of exact samples, of the samples as drawn and where 1 of PATHS is kept."""

    world: str
    model: str
    ess: float
    to: Found
    of: Found
    modes: tuple[float, ...]
    mmd: tuple[float, ...]


def folder_of(world: str, model: Model, out: Path) -> RunFolder:
    return RunFolder(out / f"worlds-{world}_{model.plain}_seed0")


def train(world: str, model: Model, out: Path) -> RunFolder:
    """The run, trained unless it is there."""
    run, name = folder_of(world, model, out), model.plain
    if len(run.metrics()) < model.updates:
        options = {
            **dict(model.options),
            "training.num_epochs": model.updates,
            "logging.sample_freq": 0,
            "logging.save_freq": model.updates,
            "saving.output_dir": out,
        }
        given = (f"--config.{key}={value}" for key, value in options.items())
        nablagfn(["train", f"--config=worlds/{world}", "--seed=0", f"--exp_name={name}", *given])
    return run


@dataclass(frozen=True)
class Paths:
    """Where paths of one prompt end [n, d], their rewards and log p_θ/p_#, [n] each."""

    x: Tensor
    reward: Tensor
    log_ratio: Tensor

    def __getitem__(self, rows: slice) -> Paths:
        return Paths(self.x[rows], self.reward[rows], self.log_ratio[rows])

    @staticmethod
    def joined(parts: Sequence[Paths]) -> Paths:
        columns = zip(*((p.x, p.reward, p.log_ratio) for p in parts), strict=True)
        return Paths(*(torch.cat(column) for column in columns))

    @staticmethod
    def drawn(
        policy: WorldPolicy, table: KernelTable, prompt: str, count: int, reference: bool = False
    ) -> Paths:
        """Of the policy, or of the pretrained model; no seed is in both."""
        first, world, found = FRESH if reference else 0, policy.world, []
        for start in range(first, first + count, CHUNK):
            seeds = range(start, start + CHUNK)
            asked = [prompt] * CHUNK
            paths = draw_paths(policy, table, asked, seeds, seed=SEED, reference=reference)
            ratio = path_ratio(policy, table, paths, of_reference=reference).log_ratio.sum(1)
            reward = world.reward(paths.clean.double(), world.rows(asked))
            found.append(Paths(paths.clean, reward, ratio))
        return Paths.joined(found)


@dataclass(frozen=True)
class Fresh:
    """What further paths show. truth, held: of each of KLS, and in how many of SETS the interval
    holds it. kept: distances in units of exact samples, of the paths as drawn and for each of
    PATHS."""

    truth: dict[str, Truth]
    held: dict[str, int]
    kept: tuple[dict[str, float], ...]


def known_kl(run: RunFolder, checkpoint: Path) -> Fresh:
    """Both KLs of the paths, means over prompts, from paths that the estimates have not seen; and
    `coverage`."""
    config = run.config()
    policy = build_policy(config, torch.device("cpu"))
    load_policy(policy, checkpoint)
    table, world = build_kernel(config, policy), policy.world
    drawn, truths, distances_kept = [], [], []
    for prompt in world.prompts:
        log_z = known_log_z(world, table, prompt)
        own = Paths.drawn(policy, table, prompt, FRESH)
        base = Paths.drawn(policy, table, prompt, FRESH, reference=True)
        drawn.append((own, base))
        truths.append(
            {
                "kl_to_target": known_kl_to(log_z, own, world.beta),
                "kl_from_target": known_kl_from(log_z, base, world.beta),
            }
        )
        known = known_target(world, table, prompt)
        distances_kept.append([kept(known, own, base, paths) for paths in (1, *PATHS)])
    truth = {name: Truth.mean([one[name] for one in truths]) for name in KLS}
    worst = tuple(
        {name: max(one[name] for one in own) for name in own[0]}
        for own in zip(*distances_kept, strict=True)
    )
    return Fresh(truth, coverage(drawn, truth, world.beta), worst)


def known_kl_to(log_z: Truth, own: Paths, beta: float) -> Truth:
    """KL(p_θ‖p*) = log Z − E_θ[log w]."""
    log_w = log_weight(own.log_ratio, own.reward, beta)
    error = log_z.error**2 + float(log_w.var()) / len(log_w)
    return Truth(log_z.value - float(log_w.mean()), error**0.5)


def known_kl_from(log_z: Truth, base: Paths, beta: float) -> Truth:
    """KL(p*‖p_θ) = E_#[exp(βr)·log w]/Z − log Z; its error that of the first part, a ratio's."""
    log_w = log_weight(base.log_ratio, base.reward, beta)
    weights = (beta * base.reward.double()).softmax(0)
    mean = float((weights * log_w).sum())
    error = float((weights * (log_w - mean)).square().sum()) + log_z.error**2
    return Truth(mean - log_z.value, error**0.5)


def kept(target: Target, own: Paths, base: Paths, paths: int) -> dict[str, float]:
    """Distances to the target where 1 in `paths` is kept, in units of `exact`: means over SHOWN
    disjoint sets. paths: 1 for the paths as they were drawn."""
    found, least = [], exact(target)
    for number in range(SHOWN):
        some = own[number * CHUNK : (number + 1) * CHUNK]
        if paths > 1:
            some = resampled(own, base, target.world.beta, paths, number)
        distance = distances(target, some.x)
        found.append({name: distance[name] / least[name] for name in distance})
    return {name: sum(one[name] for one in found) / SHOWN for name in found[0]}


@lru_cache
def exact(target: Target) -> dict[str, float]:
    """What CHUNK exact samples get, compared with the same draws of the target: a mean over EXACT
    sets."""
    sets = (target.resample(CHUNK, rng.generator(7, "exact", i)) for i in range(EXACT))
    found = [distances(target, x) for x in sets]
    return {name: sum(one[name] for one in found) / EXACT for name in found[0]}


def resampled(own: Paths, base: Paths, beta: float, paths: int, number: int) -> Paths:
    """The set of that number: CHUNK of CHUNK·K paths, of both models as `--resample` has them."""
    of_base = CHUNK * base_paths(paths)
    of_own = CHUNK * paths - of_base
    drawn = Paths.joined(
        (own[number * of_own : (number + 1) * of_own], base[number * of_base :][:of_base])
    )
    log_w = weights_of_both(drawn.log_ratio, drawn.reward, beta, paths)
    rows = chosen_rows(log_w, drawn.reward, [""] * len(log_w), paths, number)
    return Paths(drawn.x[rows], drawn.reward[rows], drawn.log_ratio[rows])


def coverage(
    drawn: Sequence[tuple[Paths, Paths]], truth: dict[str, Truth], beta: float
) -> dict[str, int]:
    """In how many of SETS further sets of samples the intervals hold the truth. drawn: the paths
    of both models, of each prompt."""
    held = dict.fromkeys(KLS, 0)
    for number in range(SETS):
        rows = slice(number * CHUNK, (number + 1) * CHUNK)
        own = Paths.joined([paths[rows] for paths, _ in drawn])
        base = Paths.joined([paths[rows] for _, paths in drawn])
        prompts = tuple(str(p) for p in range(len(drawn)) for _ in range(CHUNK))
        bootstrap = Bootstrap.of(prompts, 500, 0.95, number)
        ratio = torch.cat([own.log_ratio, base.log_ratio])
        log_w = log_weight(ratio, torch.cat([own.reward, base.reward]), beta)
        samplers = TwoSamplers.of(log_w, ratio, prompts)
        for name in KLS:
            held[name] += holds(bootstrap(getattr(samplers, name), ENDS[name]), truth[name])
    return held


def holds(figure: Interval, truth: Truth) -> bool:
    """Whether they differ by no more than both errors together."""
    if figure.low is None or figure.high is None:
        return False
    middle, half = (figure.low + figure.high) / 2, (figure.high - figure.low) / 2
    return abs(truth.value - middle) <= math.hypot(half, 1.96 * truth.error)


KNOWN: dict[tuple[str, str], Target] = {}  # by title and prompt: its three models share them


def known_target(world: World, table: KernelTable, prompt: str) -> Target:
    key = (world.title, prompt)
    if key not in KNOWN:
        KNOWN[key] = Target.of(world, table, prompt, count=BASE)
    return KNOWN[key]


def known_log_z(world: World, table: KernelTable, prompt: str) -> Truth:
    """log E[exp(βr)] under the pretrained sampler: in closed form for one Gaussian, else from a
    million of its samples."""
    closed = world.closed_form
    if closed is not None and len(closed.mixture) == 1:
        chain = gaussian_chain(closed.mixture, table)
        return Truth(gaussian_log_z(chain, closed.reward, world.beta), 0.0)
    target = known_target(world, table, prompt)
    weights = (world.beta * target.rewards).exp()
    error = float(weights.std() / weights.mean()) / len(weights) ** 0.5
    return Truth(float(weights.mean().log()), error)


def gaussian_log_z(chain: Mixture, reward: Quadratic, beta: float) -> float:
    """½[μ'ᵀΛμ' − mᵀ(m/v) − log det Λ − Σ log v], Λ = diag(1/v) + βA, Λμ' = m/v + βb."""
    mean, variances = chain.means[0], chain.variances
    precision = (1 / variances).diag() + beta * reward.A[0]
    pull = mean / variances + beta * reward.b[0]
    moved = torch.linalg.solve(precision, pull)
    tilted = moved @ pull - mean @ (mean / variances)
    return float(tilted - torch.logdet(precision) - variances.log().sum()) / 2


CERTIFIED = "certificate.json"  # in the run's folder


def finished(world: str, model: Model, out: Path) -> Row | None:
    """The row, if it is known."""
    read = folder_of(world, model, out).read_json(CERTIFIED)
    if read is None:
        return None
    kls = {name: Found.read(read[name]) for name in ("to", "of")}
    kept_of = {name: tuple(read[name]) for name in ("modes", "mmd")}
    return Row(**{**read, **kls, **kept_of})


def certify(world: str, model: Model, out: Path) -> None:
    """Find one row."""
    run = train(world, model, out)
    (measured,) = (
        row for row in evaluate(run, EvaluationRequest(), show=False)["models"] if row["update"]
    )
    figures = measured["certificate"]["figures"]
    (checkpoint,) = run.checkpoints.glob("update_*")
    fresh = known_kl(run, checkpoint)
    to, of = (
        Found(**figures[name], truth=fresh.truth[name], held=fresh.held[name]) for name in KLS
    )
    row = {
        "world": world,
        "model": model.name,
        "ess": figures["ess"]["value"],
        "to": asdict(to),
        "of": asdict(of),
        "modes": [own.get("mode_kl", own.get("gaussian_kl")) for own in fresh.kept],
        "mmd": [own["mmd2"] for own in fresh.kept],
    }
    run.write_json(CERTIFIED, row)


HEAD = """# The certificate, where the truth is known

Written by `python tools/certify.py`: three models of each [world](worlds.md), none of them
finished, one seed; 4,000 samples a prompt. KL(p_θ‖p*) and KL(p*‖p_θ) are those of
`nablagfn evaluate`, by the path weights of 4,000 paths of each of the two models, with their 95 %
intervals. The truth of the first is log Z − E[log w] of 256,000 other paths a prompt, with log Z
from a million samples of the pretrained sampler (exact in `gaussian`), that of the second
E[exp(βr)·log w]/Z − log Z of 256,000 other paths of the pretrained model; ± their standard errors.
An interval holds it if they differ by no more than both errors together.

The last two columns, samples as drawn → as `--resample 4` → as `--resample 16` keeps them (1 in 4
and 1 in 16 paths, a quarter of them the pretrained model's; means of four disjoint sets of 4,000
kept samples): distances of the worst prompt in units of what as many exact samples get (the mean of
twelve sets, compared with the same draws of a target of a million samples), KL of the modes' shares
(in `gaussian`, of the Gaussian) and MMD², as [worlds.md](worlds.md) has them.

{left}{to} of the {count} intervals of KL(p_θ‖p*) hold the truth, and {of} of those of
KL(p*‖p_θ); of {sets} sets of 4,000 further paths of each model {held_to} and {held_of} of {all} do
("held"). Of exact 95 % intervals {expected:.1f} of {count} and {often:.0f} of {all} would.

The largest MMD² of kept samples is {mmd[0]:.2f} times that of exact ones at K = 4 and {mmd[1]:.2f}
at 16, the largest KL of their modes {modes[0]:.2f} and {modes[1]:.2f}.

| world | model | ESS | KL(p_θ‖p*) | truth | held | KL(p*‖p_θ) | truth | held \
| KL of modes / exact | MMD² / exact |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def line(r: Row) -> str:
    return (
        f"| {r.world} | {r.model} | {r.ess:.2f} | {r.to.cells} | {r.of.cells} "
        f"| {arrows(r.modes)} | {arrows(r.mmd)} |"
    )


def arrows(values: tuple[float, ...]) -> str:
    """As drawn, and for each of PATHS."""
    drawn, *kept_of = values
    return " → ".join((f"{drawn:.1f}", *(f"{value:.2f}" for value in kept_of)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/certify"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--worlds", nargs="+", default=WORLDS)
    arguments = parser.parse_args()
    for world in arguments.worlds:
        for model in MODELS:
            if finished(world, model, arguments.out) is None:
                certify(world, model, arguments.out)
                write(arguments.out, arguments.docs, arguments.worlds)
    write(arguments.out, arguments.docs, arguments.worlds)


def write(out: Path, docs: Path, asked: Sequence[str]) -> None:
    """certificate.md of all that is finished; the cells of the others stay empty. asked: worlds
    that it has beside WORLDS."""
    worlds = dict.fromkeys((*WORLDS, *asked))
    found = {(w, m.name): finished(w, m, out) for w in worlds for m in MODELS}
    rows = [row for row in found.values() if row is not None]
    without = len(found) - len(rows)
    head = HEAD.format(
        left=f"{without} of the {len(found)} models were not measured yet. " if without else "",
        to=sum(row.to.holds for row in rows),
        of=sum(row.of.holds for row in rows),
        count=len(rows),
        sets=SETS,
        held_to=sum(row.to.held for row in rows),
        held_of=sum(row.of.held for row in rows),
        all=SETS * len(rows),
        expected=0.95 * len(rows),
        often=0.95 * SETS * len(rows),
        mmd=[max(own) for own in list(zip(*(row.mmd for row in rows), strict=True))[1:]],
        modes=[max(own) for own in list(zip(*(row.modes for row in rows), strict=True))[1:]],
    )
    empty = " |" * 9
    text = [
        line(row) if row else f"| {world} | {model} |{empty}"
        for (world, model), row in found.items()
    ]
    target = docs / "certificate.md"
    docs.mkdir(parents=True, exist_ok=True)
    target.write_text(head + "\n".join(text) + "\n", encoding="utf-8")
    print(f"wrote {target}: {len(rows)} of {len(found)}", flush=True)


if __name__ == "__main__":
    main()
