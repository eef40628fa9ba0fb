"""tools/collect_wheels.py without network: which wheels, for whom, and how large it all may be."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
NODE = ROOT / "tools" / "nodes" / "cuda13.txt"
WHEELS = 26.5  # MiB of what that node lacks (measured: 26.2)
CARRIED = 64.0  # MiB that the checkout and its wheels may take together


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "collect_wheels", ROOT / "tools/collect_wheels.py"
    )
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["collect_wheels"] = found
    spec.loader.exec_module(found)
    return found


INDEX = {  # name: version and what it needs
    "alpha": ("1.0", ["Beta>=2", "gone; sys_platform == 'win32'", "old; python_version < '3.10'"]),
    "beta": ("2.1", ["torch>=2.6", "gamma[fast]"]),
    "gamma": ("0.3", ["delta; extra == 'fast'", "epsilon; extra == 'slow'"]),
    "delta": ("4.0", []),
}


@pytest.fixture
def index(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """pip download from INDEX; what was asked for."""
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command and "--only-binary=:all:" in command
        wanted = Requirement(command[-1])
        asked.append(command[-1])
        known = INDEX.get(wanted.name.lower())
        if known is None:
            error = f"ERROR: No matching distribution found for {wanted}\n"
            return subprocess.CompletedProcess(command, 1, "", error)
        version, needed = known
        folder = Path(command[command.index("-d") + 1])
        name = wanted.name.lower()
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            lines = [f"Name: {name}", *(f"Requires-Dist: {text}" for text in needed), "", "text"]
            archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tool.subprocess, "run", run)
    return asked


def collected(
    tool: ModuleType, folder: Path, have: Mapping[str, str | None], *wanted: str
) -> list[str]:
    known = {name: Version(v) if v else None for name, v in have.items()}
    node = tool.Node("3.12", "x86_64", 28, known)
    found = tool.Collection(node, folder, {"beta": "beta==2.1"})
    found.close([Requirement(text) for text in wanted])
    return sorted(found.wheels)


def test_all_that_is_needed_and_not_there(
    tool: ModuleType, index: list[str], tmp_path: Path
) -> None:
    """Through markers and extras; a pin where there is one; nothing that the node has."""
    found = collected(tool, tmp_path, {"torch": "2.11.0"}, "alpha")
    assert found == ["alpha", "beta", "delta", "gamma"]
    assert index == ["alpha", "beta==2.1", "gamma", "delta"]


def test_a_node_without_torch_gets_it_too(
    tool: ModuleType, index: list[str], tmp_path: Path
) -> None:
    with pytest.raises(tool.CollectError, match=r"no wheel of torch>=2.6 for Python 3.12"):
        collected(tool, tmp_path, {}, "alpha")


@pytest.mark.parametrize("have", [{"torch": "2.5.1"}, {"torch": None, "gamma": "0.1"}])
def test_what_does_not_go_together_is_said(
    have: dict[str, str | None], tool: ModuleType, index: list[str], tmp_path: Path
) -> None:
    """An unknown version is taken as fit."""
    if have["torch"] is None:
        assert collected(tool, tmp_path, have, "alpha") == ["alpha", "beta"]
        return
    with pytest.raises(tool.CollectError, match=r"beta needs torch>=2.6, and the node has torch 2"):
        collected(tool, tmp_path, have, "alpha")


def test_pip_freeze_is_read(tool: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "node.txt"
    file.write_text(
        "# of the node\ntorch==2.11.0+cu130\nHuggingface_Hub==1.33.0\n\npeft\n"
        "mine @ file:///somewhere\n",
        encoding="utf-8",
    )
    assert tool.read_have(file) == {
        "torch": Version("2.11.0"),
        "huggingface-hub": Version("1.33.0"),
        "peft": None,
        "mine": None,
    }


@pytest.mark.parametrize(
    ("line", "name", "version"),
    [
        ("-e git+https://somewhere/x.git@abc#egg=my_pkg", "my-pkg", None),
        ("torch==2.11.0 --hash=sha256:00", "torch", "2.11.0"),
        ("torch==2.11.0 ; python_version > '3'", "torch", "2.11.0"),
        ("Zope.Interface===7.0", "zope-interface", "7.0"),
        ("torch[opt]==2.11.0  # a remark", "torch", "2.11.0"),
        ("\ufefftorch==2.11.0", "torch", "2.11.0"),
    ],
)
def test_odd_lines(
    line: str, name: str, version: str | None, tool: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "node.txt").write_text(line, encoding="utf-8")
    found = tool.read_have(tmp_path / "node.txt")
    assert found == {name: Version(version) if version else None}


@pytest.mark.parametrize("line", ["torch    2.11.0", "torch>=2", "Package Version", "------ ---"])
def test_a_line_that_says_nothing_is_named(line: str, tool: ModuleType, tmp_path: Path) -> None:
    """Or torch would be gathered once more, silently."""
    (tmp_path / "node.txt").write_text(line, encoding="utf-8")
    with pytest.raises(tool.CollectError, match=re.escape(repr(line))):
        tool.read_have(tmp_path / "node.txt")


def test_a_file_of_other_letters(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "node.txt").write_text("torch==2.11.0", encoding="utf-16")
    with pytest.raises(tool.CollectError, match="cannot be read"):
        tool.read_have(tmp_path / "node.txt")


def test_packages_within_a_wheel_are_not_its_own(tool: ModuleType, tmp_path: Path) -> None:
    """setuptools carries a dozen."""
    wheel = tmp_path / "setuptools-80.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("setuptools-80.0.dist-info/METADATA", "Requires-Dist: packaging\n\n")
        archive.writestr("setuptools/_vendor/wheel-1.dist-info/METADATA", "Requires-Dist: no\n\n")
    assert tool.needs(wheel) == ["packaging"]


def test_wheels_of_another_time_are_refused(
    tool: ModuleType, index: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole folder is what gets installed."""
    monkeypatch.setattr(tool.importlib.metadata, "requires", lambda name: ["delta"])
    (tmp_path / "delta-3.0-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        tool.main(["--out", str(tmp_path), "--extras"])
    assert "also holds delta-3.0-py3-none-any.whl" in str(end.value)


@pytest.mark.parametrize("python", ["3", "abc", "3.9", "312"])
def test_a_python_that_is_none(python: str, tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main(["--out", str(tmp_path / "new"), "--python", python])
    assert end.value.code == 2 and not (tmp_path / "new").exists()


def test_the_platform_s_names(tool: ModuleType) -> None:
    """pip compares them letter by letter: every older one is named, no newer one."""
    text = " ".join(tool.Node("3.12", "aarch64", 28, {}).tags())
    assert "manylinux_2_28_aarch64" in text and "manylinux_2_17_aarch64" in text
    assert "manylinux2014_aarch64" in text
    assert "manylinux_2_29" not in text and "x86_64" not in text


def test_the_known_node_fits_the_project_s_own_limits(tool: ModuleType) -> None:
    """What it has is new enough for pyproject.toml, so that only what lacks is gathered."""
    have = tool.read_have(NODE)
    assert have["torch"] == Version("2.11.0") and have["transformers"] == Version("5.17.0")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("dependencies = [")[2].partition("]")[0]
    wanted = [Requirement(m) for m in re.findall(r'^  "([^"]*)",', block, flags=re.MULTILINE)]
    limits = {r.name.replace("_", "-"): r.specifier for r in wanted}
    known = {name: v for name, v in have.items() if v is not None and name in limits}
    assert len(known) >= 6
    assert all(limits[name].contains(version) for name, version in known.items()), known


def test_checkout_and_wheels_can_be_carried() -> None:
    """Files of git with the wheels of the known node; what lies in .whl is measured."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    checkout = sum(file.lstat().st_size for file in files if file.is_file()) / 2**20
    assert 20 < checkout < CARRIED - WHEELS
    wheels = sum(file.stat().st_size for file in (ROOT / ".whl").glob("*.whl")) / 2**20
    assert wheels < WHEELS
