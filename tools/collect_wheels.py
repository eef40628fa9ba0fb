"""Gather the wheels that a machine without internet needs, for its Python and its platform.

    python tools/collect_wheels.py --have node.txt --out wheels     what the node lacks
    python tools/collect_wheels.py --out wheels                     everything, torch included

Run it where there is network, in an environment that has nablagfn (`make setup`). `--have` is what
the node already holds, one `NAME` or `NAME==VERSION` a line (`pip freeze > node.txt` there): those
are not gathered, and what is gathered must go with them. Versions are those of constraints.txt; of
a package that it does not name, the newest that fits. Nothing is compiled: wheels only.
docs/air_gapped.md has the recipe, from here to the first run on the node.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "nablagfn"
GLIBC = range(5, 40)  # minors of the manylinux_2_N tags; pip compares them by name, not by order
OLD_NAMES = ("manylinux1", "manylinux2010", "manylinux2014")


class CollectError(ValueError):
    """What cannot be gathered; one line that says what to do."""


@dataclass(frozen=True)
class Node:
    """The machine that the wheels are for.

    python: MAJOR.MINOR. platform: architecture on Linux (x86_64 or aarch64). glibc: the minor of
    its glibc 2.x. have: versions of what it holds by canonical name, None where not known.
    """

    python: str
    platform: str
    glibc: int
    have: Mapping[str, Version | None]

    def environment(self) -> dict[str, str]:
        """What requirements' markers are asked about."""
        return {
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": self.platform,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }

    def tags(self) -> list[str]:
        """pip's options for this machine."""
        names = [f"manylinux_2_{minor}" for minor in GLIBC if minor <= self.glibc]
        platforms = [f"{name}_{self.platform}" for name in (*names, *OLD_NAMES)]
        options = ["--python-version", self.python, "--implementation", "cp"]
        return options + [part for name in platforms for part in ("--platform", name)]

    def wants(self, requirement: Requirement, extras: Iterable[str]) -> bool:
        """Whether its marker holds there, for one of the extras."""
        if requirement.marker is None:
            return True
        return any(
            requirement.marker.evaluate({**self.environment(), "extra": extra})
            for extra in (*extras, "")
        )


@dataclass
class Collection:
    """Wheels gathered so far, by canonical name."""

    node: Node
    folder: Path
    pins: Mapping[str, str]
    wheels: dict[str, Path] = field(default_factory=dict)

    def close(self, wanted: Iterable[Requirement], extras: Iterable[str] = ()) -> None:
        """Gather `wanted` and all that it needs. Raises CollectError."""
        queue = [(r, "") for r in wanted if self.node.wants(r, extras)]
        seen = set[str]()
        while queue:
            requirement, origin = queue.pop(0)
            if str(requirement) in seen:
                continue
            seen.add(str(requirement))
            name = canonicalize_name(requirement.name)
            if name in self.node.have:
                self._agree(requirement, self.node.have[name], "the node", origin)
                continue
            if name not in self.wheels:
                self.wheels[name] = self._download(requirement)
            wheel = self.wheels[name]
            self._agree(requirement, parse_wheel_filename(wheel.name)[1], wheel.name, origin)
            found = [Requirement(text) for text in needs(wheel)]
            queue += [(r, name) for r in found if self.node.wants(r, requirement.extras)]

    def _agree(
        self, requirement: Requirement, version: Version | None, where: str, origin: str
    ) -> None:
        if version is None or requirement.specifier.contains(version, prereleases=True):
            return
        by = origin or PROJECT
        raise CollectError(
            f"{by} needs {requirement}, and {where} has {requirement.name} {version}"
        )

    def _download(self, requirement: Requirement) -> Path:
        """The wheel of constraints.txt's version, or of the newest that fits."""
        name = canonicalize_name(requirement.name)
        text = self.pins.get(name) or f"{requirement.name}{requirement.specifier}"
        before = set(self.folder.glob("*.whl"))
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", *self.node.tags(), "-d", str(self.folder)]
        done = subprocess.run([*command, text], capture_output=True, text=True, check=False)
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = last[0].removeprefix("ERROR: ") if last else "pip failed"
            machine = f"Python {self.node.python} on {self.node.platform}"
            raise CollectError(f"no wheel of {text} for {machine}: {reason}")
        found = set(self.folder.glob("*.whl")) - before
        return found.pop() if found else wheel_of(self.folder, name)


def wheel_of(folder: Path, name: str) -> Path:
    """The wheel of a package by its canonical name. Raises CollectError when there are several."""
    found = [p for p in folder.glob("*.whl") if parse_wheel_filename(p.name)[0] == name]
    if len(found) != 1:
        raise CollectError(
            f"{folder} has {len(found)} wheels of {name}: start with an empty folder"
        )
    return found[0]


def needs(wheel: Path) -> list[str]:
    """Requires-Dist of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        if len(names) != 1:  # those further down are of packages that a wheel carries within
            raise CollectError(f"{wheel.name} has no metadata of its own: it is damaged")
        (name,) = names
        header = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    return header.get_all("Requires-Dist", [])


def lines_of(file: Path) -> list[str]:
    """Without comments and blank lines."""
    lines = file.read_text("utf-8-sig").splitlines()
    rows = (re.sub(r"(^|\s)#(?!egg=).*", "", line).strip() for line in lines)
    return [row for row in rows if row]


def read_have(file: Path) -> dict[str, Version | None]:
    """What `pip freeze` prints, or bare names, by canonical name. Raises CollectError."""
    found: dict[str, Version | None] = {}
    try:
        rows = lines_of(file)
    except (OSError, UnicodeError) as error:
        raise CollectError(
            f"--have {file} cannot be read ({error}): save pip freeze as UTF-8"
        ) from None
    for row in rows:
        name, version = _held(row, file)
        found[canonicalize_name(name)] = version
    return found


def _held(row: str, file: Path) -> tuple[str, Version | None]:
    """The package of one line, and its version where the line says it; local parts (+cu130) go."""
    egg = re.search(r"#egg=([\w.-]+)", row)
    if egg is not None:  # installed for editing
        return egg[1], None
    text = row.partition(" --hash")[0].removesuffix("\\").strip()
    try:
        wanted = Requirement(text)
    except InvalidRequirement:
        raise CollectError(f"--have {file}: {row!r} is no line of `pip freeze`") from None
    versions = [s.version for s in wanted.specifier if s.operator in ("==", "===")]
    if len(versions) != len(wanted.specifier):
        raise CollectError(f"--have {file}: {row!r} does not say which version is there: use ==")
    return wanted.name, Version(versions[0].split("+")[0]) if versions else None


def read_pins(file: Path, node: Node) -> dict[str, str]:
    """constraints.txt for this node: canonical name -> NAME==VERSION."""
    rows = [Requirement(row) for row in lines_of(file)]
    chosen = [r for r in rows if node.wants(r, ())]
    return {canonicalize_name(r.name): f"{r.name}{r.specifier}" for r in chosen}


def gather(given: argparse.Namespace) -> Collection:
    """All that is needed, in `given.out`. Raises CollectError."""
    have = read_have(given.have) if given.have else {}
    node = Node(given.python, given.platform, given.glibc, have)
    try:
        own = [Requirement(text) for text in importlib.metadata.requires(PROJECT) or ()]
    except importlib.metadata.PackageNotFoundError:
        raise CollectError(f"{PROJECT} is not installed here: run `make setup` first") from None
    given.out.mkdir(parents=True, exist_ok=True)
    found = Collection(node, given.out, read_pins(ROOT / "constraints.txt", node))
    found.close(own, given.extras)
    others = sorted(
        {p.name for p in given.out.glob("*.whl")} - {p.name for p in found.wheels.values()}
    )
    if others:
        raise CollectError(f"{given.out} also holds {', '.join(others)}: empty it and start again")
    return found


def size(paths: Iterable[Path]) -> float:
    """MiB."""
    return sum(path.stat().st_size for path in paths) / 2**20


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the wheels")
    p.add_argument("--have", type=Path, help="what the node holds (pip freeze)")
    p.add_argument("--python", default="3.12", help="the node's Python, MAJOR.MINOR")
    p.add_argument("--platform", default="x86_64", choices=("x86_64", "aarch64"))
    p.add_argument("--glibc", type=int, default=28, help="N of the node's glibc 2.N")
    p.add_argument("--extras", nargs="*", default=["lion"], help="extras of nablagfn")
    p.add_argument("--limit", type=float, default=0, help="refuse more than this many MiB; 0: not")
    given = p.parse_args(arguments)
    if not re.fullmatch(r"3\.1\d", given.python):
        p.error(f"--python {given.python}: give 3.10 or a later one as MAJOR.MINOR")
    try:
        found = gather(given)
    except CollectError as error:
        sys.exit(f"collect_wheels: {error}")
    for wheel in sorted(found.wheels.values()):
        print(f"{size([wheel]):7.1f} MiB  {wheel.name}")
    total = size(found.wheels.values())
    print(f"{total:7.1f} MiB  {len(found.wheels)} wheels in {given.out}")
    if given.limit and total > given.limit:
        sys.exit(f"collect_wheels: that is more than --limit {given.limit:g} MiB")


if __name__ == "__main__":
    main()
