"""500 malformed prompt files and reward specs: one line, exit code 2, no run folder."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from nablagfn.cli import main
from nablagfn.rewards import BUILT_IN
from nablagfn.rewards.compose import BETWEEN

many = settings(max_examples=250, suppress_health_check=list(HealthCheck))


def refused(tmp_path: Path, *options: str) -> str:
    """The line on stderr of a `train` that must not start."""
    runs = tmp_path / "runs"
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as caught:
        main(
            [
                "train",
                "--config.pretrained.model=tiny-animals",
                "--config.logging.tensorboard=False",
                f"--config.saving.output_dir={runs}",
                *options,
            ]
        )
    text = told.getvalue()
    assert caught.value.code == 2, text
    assert len(text.splitlines()) == 1 and text.startswith("nablagfn: error: "), text
    assert "Traceback" not in text and not runs.exists()
    return text


# -------------------------------------------------------------------------------- prompt files

blank = st.text(alphabet=" \t\r\n\u2003", max_size=8).map(str.encode)
not_text = st.binary(max_size=30).map(lambda tail: b"\xff\xfe\xfd" + tail)
values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def is_list_of_prompts(data: Any) -> bool:
    """What a .json must hold; written here on its own."""
    return (
        bool(data)
        and isinstance(data, list)
        and all(isinstance(entry, str) and entry.strip() for entry in data)
    )


wrong_json = values.filter(lambda data: not is_list_of_prompts(data)).map(
    lambda data: json.dumps(data).encode()
)
cut_json = (
    st.lists(st.text(min_size=1, max_size=6), min_size=1)
    .map(lambda prompts: json.dumps(prompts).encode()[:-1])
    .filter(lambda data: b"]" not in data)
)
header_only = st.sampled_from([b"Prompts,Category\n", b"prompt\n", b"\xef\xbb\xbfPrompts\r\n"])
blank_cells = st.integers(1, 5).map(lambda n: b"Prompts,Category\n" + b",Colors\n" * n)

files = st.one_of(
    st.tuples(st.sampled_from([".txt", ".csv", ".json"]), not_text | blank),
    st.tuples(st.just(".json"), wrong_json | cut_json),
    st.tuples(st.just(".csv"), header_only | blank_cells),
    st.tuples(st.sampled_from([".md", ".yaml", ".py", "", ".jsonl", ".TXT.gz"]), st.binary()),
)


@many
@given(file=files)
@example(file=(".json", b"[" * 100_000))
@example(file=(".json", b'["a", "b"' + b"\x00]"))
@example(file=(".csv", b'"' + b"a" * 140_000 + b'"\n'))
def test_malformed_prompt_files(
    file: tuple[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "malformed"
    folder.mkdir(exist_ok=True)
    path = folder / f"prompts{file[0]}"
    path.write_bytes(file[1])
    text = refused(
        folder,
        f"--config.experiment.prompt_fn={path}",
        "--config.experiment.reward_fn=brightness",
    )
    assert path.name in text
    path.unlink()


# -------------------------------------------------------------------------------- reward specs

words = st.text(alphabet="abxyz-_.:*+ 0159e/=()[]{}%'\"\\\t\n€", max_size=14)
known = st.sampled_from(["brightness", "contrast", "2*brightness", "-contrast"])
specs = st.one_of(
    words,
    st.lists(words | known, min_size=2, max_size=4).map(" + ".join),
    st.lists(words | known, min_size=2, max_size=4).map(" - ".join),
    st.tuples(words, known).map("*".join),
)
entries = st.tuples(
    st.sampled_from(["normalise", "clamp"]),
    st.one_of(
        words,
        st.tuples(st.sampled_from(["brightness", "other"]), words).map("=".join),
        st.tuples(words, words).map(lambda pair: f"brightness={pair[0]}x/{pair[1]}"),
    ),
)


def names_formulas_only(spec: str) -> bool:
    """Rough: such a spec might be right; the tests of the sums look at these."""
    return all(
        any(part.strip().endswith(name) for name in BUILT_IN) for part in BETWEEN.split(spec)[::2]
    )


@many
@given(spec=specs)
@example(spec="")
@example(spec="brightness:contrast")
@example(spec="0*brightness")
@example(spec="brightness + brightness")
@example(spec="os:sep")
@example(spec="1e999*brightness")
def test_malformed_reward_specs(spec: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    wrong = ("0*brightness", "brightness + brightness", "1e999*brightness")
    assume(spec in wrong or not names_formulas_only(spec))
    refused(
        tmp_path_factory.getbasetemp() / "specs",
        f"--config.experiment.reward_fn={spec}",
        "--config.experiment.prompt_fn=simple_animals",
    )


@settings(many, max_examples=60)
@given(entry=entries)
def test_malformed_reward_settings(
    entry: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    key, text = entry
    assume("," not in text and text.strip("()[] ").strip())
    if key == "clamp":  # ':' alone, with nothing at either side, bounds nothing and is allowed
        assume(not text.replace(" ", "").endswith("=:"))
    told = refused(
        tmp_path_factory.getbasetemp() / "settings",
        f"--config.reward.{key}={text}",
        "--config.experiment.reward_fn=brightness",
        "--config.experiment.prompt_fn=simple_animals",
    )
    assert f"config.reward.{key}" in told
