"""The embedded model: size, files, and the quality of what it draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from nablagfn import StableDiffusionPolicy
from nablagfn.evaluation import draw
from nablagfn.models.latent import LatentPolicy
from nablagfn.models.locate import EMBEDDED, critics_of
from nablagfn.prompts import load_prompts
from nablagfn.rewards.critics import AnimalClassifier
from tests.tables import table_of

FOLDER = EMBEDDED["tiny-animals"]
GUIDANCE = 1.0
SAMPLES_EACH = 10


def test_it_is_a_safetensors_pipeline_of_at_most_40_megabytes() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(licence in card for licence in ("Apache-2.0", "CC BY 4.0", "MIT"))


def test_its_tokenizer_knows_its_words_and_survives_others() -> None:
    tokenizer = StableDiffusionPolicy.from_pretrained("tiny-animals").pipeline.tokenizer
    for word in (*load_prompts("simple_animals").prompts, "glossy", "background"):
        assert len(tokenizer(word).input_ids) == 3, word  # start, the word, end
    assert len(set(tokenizer("Übergröße 漢字").input_ids)) > 3


def judge(num_steps: int) -> dict[str, list[str]]:
    """What the independent classifier sees in 10 pictures of each of the 45 animals."""
    policy = StableDiffusionPolicy.from_pretrained("tiny-animals", guidance_scale=GUIDANCE)
    return judged(policy, num_steps)


def judged(policy: LatentPolicy, num_steps: int, each: int = SAMPLES_EACH) -> dict[str, list[str]]:
    """The same of a policy's pictures, `each` of every animal."""
    critics = critics_of("tiny-animals")
    assert critics is not None
    classifier = AnimalClassifier.from_folder(critics)
    table = table_of(policy, num_steps)
    seen: dict[str, list[str]] = {"asked": [], "animal": [], "style": [], "background": []}
    prompts = [p for p in load_prompts("simple_animals").prompts for _ in range(each)]
    for rows in torch.arange(len(prompts)).split(50):
        asked = [prompts[i] for i in rows]
        for head, labels in classifier.predict(
            draw(policy, table, asked, rows.tolist(), seed=0)
        ).items():
            seen[head] += labels
        seen["asked"] += asked
    return seen


def check_gate(seen: dict[str, list[str]]) -> None:
    """At least 90 % recognised; every style and background within 2x of uniform."""
    right = sum(a == b for a, b in zip(seen["asked"], seen["animal"], strict=True))
    assert right >= 0.9 * len(seen["asked"]), right
    critics = critics_of("tiny-animals")
    assert critics is not None
    labels = AnimalClassifier.from_folder(critics).labels
    for head in ("style", "background"):
        counts = Counter(seen[head])
        uniform = len(seen[head]) / len(labels[head])
        assert len(labels[head]) >= 3
        for label in labels[head]:
            assert uniform / 2 <= counts[label] <= 2 * uniform, (head, counts)


def test_450_samples_at_20_steps_pass_the_quality_gate() -> None:
    check_gate(judge(20))


@pytest.mark.proof
def test_450_samples_at_50_steps_pass_the_quality_gate() -> None:
    check_gate(judge(50))


def test_it_loads_without_warnings(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        FOLDER, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a cat", num_inference_steps=2, guidance_scale=1.0).images
    assert images[0].size == (64, 64)
    assert not caplog.records
