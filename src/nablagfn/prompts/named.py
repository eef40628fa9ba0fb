"""Prompt sets by name. Lists that are not shipped come from the folder NABLAGFN_PROMPTS or from the
hub, and must have the published content."""

from __future__ import annotations

import csv
import difflib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import ConfigError, find_file
from ..runs.hub import HubFile, fetch
from .files import PARSERS, read_prompts
from .sets import PromptSet

ASSETS = Path(__file__).parent.parent / "assets"
FOLDER = "NABLAGFN_PROMPTS"


@dataclass(frozen=True)
class Published:
    """A list by its name in NABLAGFN_PROMPTS. sha256: of its content, see `digest`. hub: a copy."""

    name: str
    sha256: str
    hub: HubFile | None = None


def digest(rows: Sequence[str]) -> str:
    """SHA-256 of prompts joined by newlines: the same for any file format."""
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _hpd(style: str, sha256: str) -> Published:
    revision = "3246bc66b01b69837fabf975bddbcbb52a9afac2"
    hub = HubFile("zhwang/HPDv2", revision, f"benchmark/{style}.json", kind="dataset")
    return Published(f"HPDv2/benchmark_{style}.json", sha256, hub)


DRAWBENCH = Published(
    "DrawBench Prompts.csv", "4056f6f1125417b3964a1623200158d7de26ee5869d2be8661737297ddca0dd1"
)
IMAGENET = Published(
    "imagenet_classes.txt", "a40d9be82eb4738becd1dd69991b89f87f309975e860a6f3f45395d8c06a7e0d"
)
HPD = {
    "photo": _hpd("photo", "0f5fa04cbd7cced663de3bab8aa4a74cda2306e7e991ba9f7ee11d21a0141b01"),
    "painting": _hpd(
        "paintings", "fad9d142a3c9ac0750ac39f419c6cbd6b01b511087874cb8722c1a354634b319"
    ),
    "anime": _hpd("anime", "3fc1e8743ca99e7f8077eb7c0d2712ee7dda07a69e917a1a7284f8a7474a9399"),
    "concept": _hpd(
        "concept-art", "7ae4c82e29411f3c489f8edb4b62ba1e24b143e517f7762527cbb70bda09f5f6"
    ),
}
HELD_OUT_OF_STYLE = 10  # of HPDv2's 800
HELD_OUT_OF_CATEGORY = 2  # of DrawBench
LEFT_OUT = ("Misspellings", "Rare Words")  # DrawBench's categories that SD1.5 cannot spell
ANIMALS, DOGS = slice(0, 398), slice(151, 269)  # of ImageNet's classes


def locate(published: Published) -> Path:
    """The list's file: in NABLAGFN_PROMPTS, or from the hub. Raises ConfigError."""
    folder = os.environ.get(FOLDER, "")
    if folder:
        found = find_file(os.path.join(folder, published.name))
        if found is not None:
            return found
    help_text = f"set {FOLDER} to a folder that has {published.name!r}"
    if published.hub is None:
        raise ConfigError(f"this list is not shipped and has no copy on the hub: {help_text}")
    try:
        return fetch(published.hub)
    except ConfigError as error:
        raise ConfigError(f"this list is not shipped: {error}; or {help_text}") from None


def published_rows(published: Published) -> tuple[str, ...]:
    """The list's prompts. Raises ConfigError when it is missing or has been changed."""
    path = locate(published)
    rows = read_prompts(path).prompts
    if digest(rows) != published.sha256:
        raise ConfigError(
            f"prompt file {path} is not the published list: name a changed list by its path"
        )
    return rows


def _simple_animals() -> PromptSet:
    return read_prompts(ASSETS / "prompts" / "simple_animals.txt")


def _imagenet(part: slice) -> Callable[[], PromptSet]:
    """Class names as ImageNet has them, synonyms included."""
    return lambda: PromptSet(published_rows(IMAGENET)[part])


def _drawbench() -> PromptSet:
    """165 to train on; the first 2 of each of the 9 categories held out."""
    prompts = published_rows(DRAWBENCH)
    with locate(DRAWBENCH).open(encoding="utf-8-sig", newline="") as stream:
        categories = [row["Category"] for row in csv.DictReader(stream)]
    train: list[str] = []
    held: list[str] = []
    for category in dict.fromkeys(categories):
        if category not in LEFT_OUT:
            own = [p for p, c in zip(prompts, categories, strict=True) if c == category]
            held += own[:HELD_OUT_OF_CATEGORY]
            train += own[HELD_OUT_OF_CATEGORY:]
    return PromptSet(tuple(train), tuple(held))


def _hpd_styles(*styles: str) -> Callable[[], PromptSet]:
    """The first 10 of each style held out; of the rest, what repeats one of these is left out."""

    def load() -> PromptSet:
        lists = [published_rows(HPD[style]) for style in styles]
        held = [p for rows in lists for p in rows[:HELD_OUT_OF_STYLE]]
        train = [p for rows in lists for p in rows[HELD_OUT_OF_STYLE:] if p not in held]
        return PromptSet(tuple(train), tuple(held))

    return load


ACTIVITIES = ("washing dishes", "riding a bike", "playing chess")  # Black et al. 2024
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = {
    **{same: same for same in ("sheep", "deer", "fish")},
    "wolf": "wolves",
    "mouse": "mice",
    "goose": "geese",
}


def _nouns_activities() -> PromptSet:
    """'a cat riding a bike': every animal with every activity."""
    animals = _simple_animals().prompts
    return PromptSet(tuple(f"{article(a)} {doing}" for a in animals for doing in ACTIVITIES))


def _counting() -> PromptSet:
    """'three cats': every animal, two to nine of it."""
    animals = _simple_animals().prompts
    return PromptSet(tuple(f"{number} {plural(a)}" for a in animals for number in NUMBERS))


def article(noun: str) -> str:
    """'a cat', 'an ant': by the first letter, which is right for the 45 animals."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """'cats', 'foxes', 'butterflies', 'mice': right for the 45 animals."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith(("x", "s", "sh", "ch")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


BUILT_IN: dict[str, Callable[[], PromptSet]] = {
    "simple_animals": _simple_animals,
    "imagenet_animals": _imagenet(ANIMALS),
    "imagenet_dogs": _imagenet(DOGS),
    "imagenet_all": _imagenet(slice(None)),
    "drawbench": _drawbench,
    "hpd": _hpd_styles(*HPD),
    "hpd_photo": _hpd_styles("photo"),
    "hpd_photo_painting": _hpd_styles("photo", "painting"),
    "hpd_photo_anime": _hpd_styles("photo", "anime"),
    "hpd_photo_concept": _hpd_styles("photo", "concept"),
    "nouns_activities": _nouns_activities,
    "counting": _counting,
}


def load_prompts(spec: str) -> PromptSet:
    """The prompt set named by `experiment.prompt_fn`: a built-in name or a file.

    Raises ConfigError, one line, when it cannot be had.
    """
    if spec in BUILT_IN:
        try:
            return BUILT_IN[spec]()
        except ConfigError as error:
            raise ConfigError(f"config.experiment.prompt_fn={spec!r}: {error}") from None
    path = find_file(spec)
    if path is not None:
        return read_prompts(path)
    if spec.lower().endswith(tuple(PARSERS)):
        raise ConfigError(f"config.experiment.prompt_fn={spec!r}: no such file")
    near = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"config.experiment.prompt_fn={spec!r} is unknown: did you mean {near}? "
        "(or give a .txt, .json or .csv file)"
    )
