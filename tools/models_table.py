"""What an update of each published architecture takes: parameters, memory, least time.

    python tools/models_table.py            # writes the table into docs/models.md (minutes)
    python tools/models_table.py --only sd35 flux

Nothing is loaded: the architectures are counted on the "meta" device, as `nablagfn plan` counts
them, with the settings of each recipe (config/NAME.py; reward aesthetic). The cards' rates are
their published dense bfloat16 ones. No run reaches them: a time is the least, not a forecast.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pages import insert_between

from nablagfn.commands import planner
from nablagfn.commands.planner.parts import measure
from nablagfn.commands.planner.plan import CONTEXT, RunPlan, choose
from nablagfn.commands.planner.work import work_of
from nablagfn.families import find_family
from nablagfn.recipes.options import load_config
from nablagfn.runtime.costs import size_of, tensors_of

DOC = Path(__file__).parent.parent / "docs" / "models.md"
MARK = "<!-- models-table -->"
RECIPES = ("aesthetic", "sdxl", "sd35", "flux", "flux2_klein", "qwen_image", "z_image")


@dataclass(frozen=True)
class Card:
    """memory: GB. rate: dense bfloat16 TFLOP/s, as its maker publishes it."""

    name: str
    memory: int
    rate: float


CARDS = (
    Card("RTX 4090", 24, 165.2),
    Card("L40S", 48, 362.05),
    Card("H100 SXM", 80, 989.4),
)


def row(name: str) -> dict[str, object]:
    """The figures of one recipe: JSON of plain numbers."""
    config = load_config(name)
    with torch.device("meta"):
        policy = find_family(config).skeleton(config)
        found: dict[str, object] = {
            "recipe": name,
            "model": config.pretrained.model,
            "network": sum(p.numel() for p in policy.network.parameters() if not p.requires_grad),
            "encoders": sum(t.numel() for t in tensors_of(list(policy.encoders().values()))),
            "lora": size_of(policy.parameters()) // 4,
            "latents": list(policy.sample_shape),
            "paths": config.training.batch_size * config.training.gradient_accumulation_steps,
        }
    device = torch.device("cuda")
    parts, work = measure(config, device), work_of(config)
    for card in CARDS:
        found[card.name] = on_card(card, choose(config, parts, work, usable(card)))
    return found


def usable(card: Card) -> float:
    """Bytes, as `nablagfn plan --memory` counts them."""
    return planner.parse_memory(f"{card.memory}GB") - CONTEXT


def on_card(card: Card, plan: RunPlan) -> dict[str, float] | None:
    """Peak in GB and the least seconds of an update; None: nothing fits."""
    if plan.setting is None:
        return None
    prices = planner.at_rate(plan.prices, card.rate * 1e12)
    return {"peak": plan.peak / 1e9, "seconds": planner.total(plan.passes, prices)}


def table(rows: list[dict]) -> str:
    """Markdown."""
    heads = " | ".join(f"{card.name}, {card.memory} GB" for card in CARDS)
    lines = [
        f"| recipe | network | text encoders | LoRA | latents | paths an update | {heads} |",
        "|---|---|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for found in rows:
        cells = []
        for card in CARDS:
            fits = found[card.name]
            cells.append(
                f"{fits['peak']:.0f} GB, {fits['seconds']:.2g} s" if fits else "does not fit"
            )
        latents = "×".join(map(str, found["latents"]))
        lines.append(
            f"| `{found['recipe']}` | {found['network'] / 1e9:.2f} B | "
            f"{found['encoders'] / 1e9:.2f} B | {found['lora'] / 1e6:.1f} M | {latents} | "
            f"{found['paths']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", nargs="*", default=RECIPES, choices=RECIPES)
    p.add_argument("--rows", type=Path, help="a JSON lines file that keeps the rows that are done")
    args = p.parse_args()
    rows = {}
    if args.rows and args.rows.is_file():
        for line in args.rows.read_text(encoding="utf-8").splitlines():
            rows[json.loads(line)["recipe"]] = json.loads(line)
    for name in args.only:
        if name in rows:
            continue
        rows[name] = row(name)
        print(json.dumps(rows[name]), flush=True)
        if args.rows:
            with args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[name]) + "\n")
    made = table([rows[name] for name in RECIPES if name in rows])
    insert_between(DOC, MARK, f"{MARK}\n{made}\n{MARK}", MARK)


if __name__ == "__main__":
    main()
