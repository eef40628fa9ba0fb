"""A run folder with every file that a report reads, its figures chosen by hand."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

from PIL import Image

from nablagfn.config import Config, set_option
from nablagfn.runs.runfolder import RunFolder

HOSTILE = "<script>alert(1)</script>"
PROMPTS = ("a cat", HOSTILE)
EACH = 4  # samples of a prompt
SIDE, GAP, COLUMNS = 16, 2, 3
MODELS = {"base": 0, "update_000002": 2, "update_000004": 4}
REWARDS = {  # of each sample; base: mean 0, standard deviation 2
    "base": [-3.0, -1.0, 1.0, 3.0, -2.0, 2.0, 0.0, 0.0],
    "update_000002": [0.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 4.0],
    "update_000004": [5.0, 9.0, 1.0, 7.0, 3.0, 8.0, 2.0, 6.0],
}


def colour(model: str, place: int) -> tuple[int, int, int]:
    """Each picture has its own."""
    hue = (list(MODELS).index(model) * 8 + place) / 24
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.7, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def figures(model: str) -> dict[str, Any]:
    """Reward 0, 2, 5 and diversity 0.8, 0.76, 0.6 with intervals; recognised 0.9, 0.9, 0.7."""
    i = list(MODELS).index(model)
    reward, diversity = (0.0, 2.0, 5.125)[i], (0.8, 0.76, 0.6)[i]
    found = {
        "reward": {"value": reward, "low": reward - 0.5, "high": reward + 0.5},
        "diversity": {"value": diversity, "low": diversity - 0.04, "high": diversity + 0.04},
        "recognised": {"value": (0.9, 0.9, 0.7)[i], "low": None, "high": None},
        "reward_held-out": {"value": -0.1 * i, "low": None, "high": None},
    }
    return found if i == 0 else {"kid": {"value": 0.5}, **found, "path_kl": {"value": 7.0 * i}}


def certificate(update: int) -> dict[str, Any]:
    """Efficiency 25 % of 7 nats a checkpoint; the second step spends most."""
    return {
        "beta": 1000.0,
        "figures": {
            "path_kl": {"value": 3.5 * update, "low": 3.0 * update, "high": 4.0 * update},
            "least_kl": {"value": 0.875 * update},
            "efficiency": {"value": 0.25, "low": 0.2, "high": 0.3},
            "ess": {"value": 0.0625},
        },
        "step_kl": [0.25 * update, 3.0 * update, 0.25 * update],
        "why": "",
        "notes": [f"few samples {HOSTILE}"],
    }


def frontier() -> list[dict[str, Any]]:
    """Reward 0 … 8 at 0 … 4 nats."""
    return [
        {
            "beta": k,
            "kl": {"value": 1.0 * k},
            "reward": {"value": 2.0 * k, "low": 1.5 * k, "high": 2.5 * k},
        }
        for k in range(5)
    ]


def make(path: Path, **options: object) -> RunFolder:
    """Write it. options: by dotted name, dots as double underscores."""
    folder = RunFolder(path)
    config = Config()
    chosen = {"pretrained__model": "tiny-animals", "experiment__reward_fn": "tiny-aesthetic"}
    for key, value in {**chosen, "sampling__num_steps": 20, **options}.items():
        set_option(config, key.replace("__", "."), value)
    folder.write_json("config.json", config.model_dump(mode="json"))
    folder.write_json("prompts.json", list(PROMPTS))
    folder.write_json("versions.json", {"torch": "2.0", "device": "cpu", "processes": "1"})
    _write_logs(folder)
    _write_evaluation(folder)
    for i, name in enumerate(("before", "after", "epoch_00000", "epoch_00002", "epoch_00004")):
        folder.grids.mkdir(exist_ok=True)
        Image.new("RGB", (40, 20), (40 * i, 90, 200 - 40 * i)).save(folder.grids / f"{name}.png")
    for name in list(MODELS)[1:]:
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "pytorch_lora_weights.safetensors").write_bytes(b"")
    return folder


def _write_logs(folder: RunFolder) -> None:
    for update in range(1, 5):
        row: dict[str, Any] = {"update": update, "epoch": update, "reward": 1.0 * update}
        row |= {"reward_std": 1.0, "loss_forward": 2.0 / update, "grad_norm": 1.0}
        row |= {"model_evals": 1000.0, "seconds": 20.0 * update}
        if update % 2 == 0:
            kept = 1.0 - 0.1 * update
            row |= {"probe_reward": 1.0, "probe_reward_held-out": -1.0}
            row |= {"probe_diversity": 0.8 * kept, "probe_diversity_kept": kept}
        folder.append("metrics.jsonl", row)
        levels = {"steps": [[0, 9], [10, 19]], "count": [3, 0]}
        values = {"loss_forward": [2.0, None], "cosine": [-0.5, None], "flow_sq": [0.0, None]}
        folder.append("diagnostics.jsonl", {"update": update, **levels, **values})
    best = {"checkpoint": "update_000002", "update": 2, "figures": {}}
    event = {"update": 4, "text": f"diversity too low {HOSTILE}: stopped"}
    folder.write_json("guard.json", {"best": best, "events": [event]})


def _write_evaluation(folder: RunFolder) -> None:
    before = {"num_samples": 8, "reward_mean": 0.0, "reward_std": 4.0, "diversity": 0.8}
    after = {**before, "reward_mean": 4.0, "diversity": 0.4, "recognised": 0.8, "path_kl": 3.0}
    prompts = {p: {"reward": 1.5, "diversity": 0.25} for p in PROMPTS}
    evaluated = {
        "settings": {
            "prompts": list(PROMPTS),
            "images_per_prompt": EACH,
            "trained_reward": "tiny-aesthetic",
            "confidence": 0.95,
        },
        "models": [
            {
                "name": name,
                "update": update,
                "figures": figures(name),
                "prompts": prompts,
                **({"certificate": certificate(update)} if update else {}),
            }
            for name, update in MODELS.items()
        ],
        "frontier": frontier(),
    }
    folder.write_json(
        "evaluation.json",
        {
            "before": {**before, "recognised": 0.9, "path_kl": 0.0},
            "after": after,
            "updates": 4,
            "evaluated": evaluated,
        },
    )
    for name in MODELS:
        _write_pictures(folder, name)


def _write_pictures(folder: RunFolder, name: str) -> None:
    samples = [
        {"index": i, "prompt": PROMPTS[i // EACH], "rewards": {"tiny-aesthetic": reward}}
        for i, reward in enumerate(REWARDS[name])
    ]
    sheet = {"columns": COLUMNS, "thumbnail": [SIDE, SIDE], "gap": GAP, "samples": samples}
    folder.write_json(f"evaluation/{name}/samples.json", sheet)
    rows = -(-len(samples) // COLUMNS)
    size = (COLUMNS * (SIDE + GAP) - GAP, rows * (SIDE + GAP) - GAP)
    picture = Image.new("RGB", size, "white")
    for i in range(len(samples)):
        corner = (i % COLUMNS * (SIDE + GAP), i // COLUMNS * (SIDE + GAP))
        picture.paste(colour(name, i), (*corner, corner[0] + SIDE, corner[1] + SIDE))
    picture.save(folder.path / "evaluation" / name / "pictures.png")
