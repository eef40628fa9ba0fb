"""Prompt sets: what is in them, what is held out, and that nothing changes them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from nablagfn.config import Config, ConfigError
from nablagfn.core import rng
from nablagfn.methods.build import build_kernel
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import BUILT_IN, PromptSet, load_prompts
from nablagfn.prompts import named as module
from nablagfn.prompts.named import plural
from nablagfn.training.collect import Collector
from nablagfn.training.trainer import Trainer
from tests.shared import PROMPTS, needs_prompts
from tests.test_docs import small_config
from tests.tiny_pipeline import make_pipeline

pytestmark = pytest.mark.usefixtures("no_report")

SIZES = {  # to train on, held out
    "simple_animals": (45, 0),
    "imagenet_animals": (398, 0),
    "imagenet_dogs": (118, 0),
    "imagenet_all": (1000, 0),
    "drawbench": (165, 18),
    "hpd": (3160, 40),
    "hpd_photo": (790, 10),
    "hpd_photo_painting": (1580, 20),
    "hpd_photo_anime": (1580, 20),
    "hpd_photo_concept": (1580, 20),
    "nouns_activities": (135, 0),
    "counting": (360, 0),
}
SHIPPED = ("simple_animals", "nouns_activities", "counting")


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of published lists."""
    assert PROMPTS is not None
    monkeypatch.setenv("NABLAGFN_PROMPTS", str(PROMPTS))
    return PROMPTS


def test_every_built_in_set_has_a_size_here() -> None:
    assert set(BUILT_IN) == set(SIZES)


@needs_prompts
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, lists: Path) -> None:
    found = load_prompts(name)
    assert (len(found), len(found.held_out)) == SIZES[name]
    assert not set(found.prompts) & set(found.held_out)
    assert found.evaluation.prompts == (found.held_out or found.prompts)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_need_no_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NABLAGFN_PROMPTS", raising=False)
    assert len(load_prompts(name)) == SIZES[name][0]


@needs_prompts
def test_contents(lists: Path) -> None:
    assert load_prompts("imagenet_all").prompts[:2] == (
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
    )
    assert load_prompts("imagenet_dogs").prompts[0] == "Chihuahua"
    drawbench = load_prompts("drawbench")
    assert drawbench.held_out[:2] == ("A red colored car.", "A black colored car.")
    assert drawbench.prompts[0] == "A pink colored car."
    photo = json.loads((lists / "HPDv2" / "benchmark_photo.json").read_text(encoding="utf-8"))
    found = load_prompts("hpd_photo")
    assert found.held_out == tuple(p.strip() for p in photo[:10])
    assert found.prompts == tuple(p.strip() for p in photo[10:])
    both = load_prompts("hpd_photo_painting")
    assert both.prompts[:790] == found.prompts and both.held_out[:10] == found.held_out
    anime = load_prompts("hpd_photo_anime")
    assert anime.prompts[:790] == found.prompts and anime.prompts[790:] != both.prompts[790:]


@needs_prompts
def test_drawbench_leaves_out_what_cannot_be_spelt(lists: Path) -> None:
    import csv

    with (lists / "DrawBench Prompts.csv").open(encoding="utf-8", newline="") as stream:
        category = {row["Prompts"]: row["Category"] for row in csv.DictReader(stream)}
    found = load_prompts("drawbench")
    kept = Counter(category[p] for p in (*found.prompts, *found.held_out))
    assert not {"Misspellings", "Rare Words"} & set(kept) and sum(kept.values()) == 183
    held = Counter(category[p] for p in found.held_out)
    assert set(held.values()) == {2} and set(held) == set(kept)


def test_made_up_prompts_read_well() -> None:
    doing = load_prompts("nouns_activities").prompts
    assert "a cat riding a bike" in doing and "an ant playing chess" in doing
    counted = load_prompts("counting").prompts
    assert {"two cats", "nine wolves", "five mice", "three butterflies"} <= set(counted)
    odd = {"sheep": "sheep", "fox": "foxes", "goose": "geese", "monkey": "monkeys", "fly": "flies"}
    assert {noun: plural(noun) for noun in odd} == odd


# -------------------------------------------------------------------------------- missing, changed


def one_line(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_prompts(name)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "config.experiment.prompt_fn" in message
    return message


@pytest.mark.parametrize("name", sorted(set(SIZES) - set(SHIPPED)))
def test_a_list_that_is_not_there_says_where_to_put_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("NABLAGFN_PROMPTS", raising=False)
    assert "NABLAGFN_PROMPTS" in one_line(name)
    monkeypatch.setenv("NABLAGFN_PROMPTS", str(tmp_path))
    assert "NABLAGFN_PROMPTS" in one_line(name)


@needs_prompts
def test_a_changed_list_is_refused_by_name(
    lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(lists, folder, copy_function=shutil.copyfile)
    for file in [f for f in folder.rglob("*") if f.suffix in (".json", ".csv", ".txt")]:
        text = file.read_text(encoding="utf-8").replace("cat", "dog")
        file.chmod(0o644)
        file.write_text(text, encoding="utf-8")
    monkeypatch.setenv("NABLAGFN_PROMPTS", str(folder))
    for name in ("imagenet_all", "hpd_photo", "drawbench"):
        assert "not the published list" in one_line(name)


@needs_prompts
def test_a_list_from_the_hub_is_checked_too(
    lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NABLAGFN_PROMPTS", raising=False)
    monkeypatch.setattr(
        module, "fetch", lambda file: lists / f"HPDv2/benchmark_{Path(file.name).name}"
    )
    assert len(load_prompts("hpd_photo")) == 790
    other = tmp_path / "photo.json"
    other.write_text('["something else"]', encoding="utf-8")
    monkeypatch.setattr(module, "fetch", lambda file: other)
    assert "not the published list" in one_line("hpd_photo")


# -------------------------------------------------------------------------------- never changed


def test_a_set_does_not_follow_the_list_it_was_made_of() -> None:
    given, held = ["a cat", "a dog"], ["a fox"]
    found = PromptSet(given, held)  # type: ignore[arg-type]
    given.append("a bird")
    held.clear()
    assert found.prompts == ("a cat", "a dog") and found.held_out == ("a fox",)
    with pytest.raises(AttributeError):
        found.prompts = ()  # type: ignore[misc]


def test_draws_leave_the_set_unchanged_and_are_uniform() -> None:
    found = PromptSet(tuple("abcde"), ("x", "y"))
    draws = Counter(found.draw(rng.generator(0, "prompt", i)) for i in range(2000))
    found.spread(3), found.evaluation
    assert found == PromptSet(tuple("abcde"), ("x", "y"))
    assert set(draws) == set("abcde") and all(330 < n < 470 for n in draws.values())


def test_loading_twice_gives_the_same_set() -> None:
    first = load_prompts("counting")
    for step in range(1000):
        first.draw(rng.generator(0, "prompt", step))
    assert load_prompts("counting") == first


def test_draws_are_a_function_of_seed_rank_and_step() -> None:
    found = load_prompts("counting")
    policy = StableDiffusionPolicy(make_pipeline(), seed=0)

    def drawn(seed: int, rank: int, epoch: int) -> tuple[str, ...]:
        config = Config()
        config.seed = seed
        config.sampling.batch_size, config.sampling.num_batches_per_epoch = 4, 1
        table = build_kernel(small(config), policy)
        collector = Collector(policy, table, found, config, rank=rank, world=2)
        return collector.collect(epoch).condition.prompts

    known = drawn(0, 0, 0)
    assert drawn(0, 0, 0) == known
    assert len({known, drawn(1, 0, 0), drawn(0, 1, 0), drawn(0, 0, 1)}) == 4


def small(config: Config) -> Config:
    config.sampling.num_steps = 2
    return config


def test_a_run_trains_on_the_set_and_measures_what_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nablagfn.evaluation.samples as evaluation

    measured: set[str] = set()
    draw = evaluation.draw_paths

    def recorded(policy, table, prompts, seeds, **options):
        measured.update(prompts)
        return draw(policy, table, prompts, seeds, **options)

    monkeypatch.setattr(evaluation, "draw_paths", recorded)
    trained: set[str] = set()

    def reward(images, prompts, metadata):
        if images.requires_grad:
            trained.update(prompts)
        return images.mean((1, 2, 3))

    trainer = Trainer(
        StableDiffusionPolicy(make_pipeline(), seed=0),
        reward,
        PromptSet(("cat", "dog"), ("fox", "bee")),
        small_config(tmp_path, no_flow=True),
        show_progress=False,
    )
    trainer.fit()
    assert trained <= {"cat", "dog"} and trained
    assert measured <= {"fox", "bee"} and measured
