"""Files from the hub: pinned, checked, downloaded once per machine. The hub is a folder here."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nablagfn.config import ConfigError
from nablagfn.rewards import weights
from nablagfn.rewards.weights import Finder, Part
from nablagfn.runs import hub
from nablagfn.runs.hub import HubFile, fetch

CONTENT = b"weights"
SHA = hashlib.sha256(CONTENT).hexdigest()
FILE = HubFile("owner/name", "a" * 40, "model.safetensors", SHA)


class FakeHub:
    """hf_hub_download over a folder, counting."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.downloads: list[str] = []
        self.content = CONTENT

    def download(self, repo: str, name: str, revision: str, repo_type: str) -> str:
        assert (repo, revision, repo_type) == (FILE.repo, FILE.revision, "model")
        self.downloads.append(name)
        path = self.cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return str(path)

    def cached(self, file: HubFile) -> Path | None:
        path = self.cache / file.name
        return path if path.is_file() else None


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub
    from huggingface_hub import constants

    found = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
    monkeypatch.setattr(hub, "in_cache", found.cached)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return found


def one_line(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_file_is_downloaded_once_and_checked_once(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []
    monkeypatch.setattr(hub, "sha256_of", lambda path: checked.append(path) or SHA)
    assert fetch(FILE).read_bytes() == CONTENT == fetch(FILE).read_bytes()
    assert fake.downloads == ["model.safetensors"] and len(checked) == 1


def test_a_wrong_digest_is_refused_each_time(fake: FakeHub) -> None:
    fake.content = b"other weights"
    for _ in range(2):
        assert "SHA-256" in one_line(lambda: fetch(FILE))
    fake.content = CONTENT
    assert "delete it" in one_line(lambda: fetch(FILE))
    shutil.rmtree(fake.cache)
    assert fetch(FILE).read_bytes() == CONTENT


def test_a_file_that_changes_after_its_check_is_checked_again(fake: FakeHub) -> None:
    path = fetch(FILE)
    path.write_bytes(b"changed!")
    assert "SHA-256" in one_line(lambda: fetch(FILE))


def test_without_network_the_line_comes_at_once(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    assert "hub cannot be reached" in one_line(lambda: fetch(FILE))
    assert fake.downloads == []


def test_what_the_hub_says_is_passed_on(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise OSError("404\nnot found\n")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert "cannot be downloaded (404)" in one_line(lambda: fetch(FILE))


RACE = """
import sys, time
from pathlib import Path
from nablagfn.runs import hub
folder = Path(sys.argv[1])
file = hub.HubFile("owner/name", "a" * 40, "file.bin", sys.argv[2])
target = folder / "cached.bin"
def download(file):
    with open(folder / "downloads.txt", "a") as log:
        log.write("one\\n")
    time.sleep(0.5)
    target.write_bytes(b"weights")
    return target
hub.in_cache = lambda file: target if target.is_file() else None
hub._download = download
assert hub.fetch(file) == target
"""


def test_processes_of_one_machine_download_once(tmp_path: Path) -> None:
    import os

    script = tmp_path / "race.py"
    script.write_text(textwrap.dedent(RACE), encoding="utf-8")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(script), str(tmp_path), SHA]
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert (tmp_path / "downloads.txt").read_text(encoding="utf-8") == "one\n"


# -------------------------------------------------------------------------------- the parts


PARTS = [value for value in vars(weights).values() if isinstance(value, Part)]


def test_every_part_is_pinned_and_its_weights_have_a_digest() -> None:
    assert len(PARTS) == 8
    for file in [file for part in PARTS for file in part.files]:
        assert re.fullmatch(r"[0-9a-f]{40}", file.revision), file
        large = file.name.endswith((".safetensors", ".pt", ".pth"))
        if file.repo == "facebook/dinov2-base":  # an extractor's; its digest could not be had here
            continue
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256) if large else True, file


def test_parts_on_the_hub_are_found_as_file_or_folder(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = HubFile(FILE.repo, FILE.revision, "vocab.json")
    folder = Part("clip", (other, FILE))
    file = Part("head.pth", (HubFile(FILE.repo, FILE.revision, "aesthetic.pth", SHA),))
    found = Finder("aesthetic", "").find(folder, file)
    assert found == [fake.cache, fake.cache / "aesthetic.pth"]
    assert fake.downloads == ["vocab.json", "model.safetensors", "aesthetic.pth"]


def test_what_is_missing_is_said_before_anything_is_loaded() -> None:
    """Offline, without a cache: one line that names the reward, the file and the folder."""
    from nablagfn.rewards import resolve

    for name, file in (("hpsv2", "HPS_v2.1"), ("imagereward", "ImageReward.pt")):
        message = one_line(lambda name=name: resolve(name, torch.device("cpu")))
        assert name in message and file in message and "--config.reward.weights=FOLDER" in message
