"""The architecture: dependencies point down only, functions are short, torch loads only if used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nablagfn

SOURCE = Path(nablagfn.__file__).parent
ROOT = Path(__file__).parent.parent
LONGEST = 60  # lines of a function, its docstring left out

LAYERS = (
    {"types", "rng", "config"},
    {"kernels", "critics", "configs", "progress", "pictures", "groups", "surrogate"},
    {"rollout", "lookahead", "value_gradient", "path_kl", "counting", "runfolder", "advice"}
    | {"optimizers", "distributed", "hub", "backoff", "costs", "metrics"},
    {"bellman", "worlds"} | {"rewards", "models", "prompts", "report"},
    {"objectives", "estimators", "extractors", "diff"},
    {"collect", "evaluation", "methods", "guard", "diagnostics", "runlog", "options"}
    | {"architectures"},
    {"checkpoint", "updater"},
    {"observe"},
    {"trainer"},
    {"assemble"},
    {"check_reward", "evaluate", "planner", "export"},
    {"doctor"},
    {"cli"},
    {"__init__", "__main__"},
)
LAYER = {module: level for level, modules in enumerate(LAYERS) for module in modules}
PARTS = {"objectives", "estimators", "metrics"}  # folders whose files do not know each other either
TORCH_FREE = ("nablagfn", "nablagfn.config", "nablagfn.options", "nablagfn.runfolder")
TORCH_FREE += ("nablagfn.cli", "nablagfn.report", "nablagfn.diff", "nablagfn.advice")

FILES = sorted(SOURCE.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def top(dotted: str) -> str:
    """'models.flow' -> 'models'; '' (the package itself) -> '__init__'."""
    return dotted.partition(".")[0] or "__init__"


def module_of(path: Path) -> str:
    """'models/flow.py' -> 'models.flow', 'models/__init__.py' -> 'models'."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def targets(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Modules of nablagfn that an import statement names, without the package's own name."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        start = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
        names = [f"{start}.{alias.name}" for alias in node.names]
    else:
        return []
    return [n.removeprefix("nablagfn").lstrip(".") for n in names if n.split(".")[0] == "nablagfn"]


def imports(path: Path) -> set[str]:
    """Every nablagfn module that a file imports, at its top or inside a function."""
    package = ("nablagfn", *path.relative_to(SOURCE).parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name for node in ast.walk(tree) for name in targets(node, package)}


def test_the_import_reader_sees_imports(tmp_path: Path) -> None:
    code = "from ..config import Config\nfrom . import flow\nimport nablagfn.rng\nimport torch"
    found = [t for node in ast.parse(code).body for t in targets(node, ("nablagfn", "models"))]
    assert found == ["config.Config", "models.flow", "rng"]
    assert "lookahead.guess" in imports(SOURCE / "estimators" / "guess.py")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_module_has_a_layer(path: Path) -> None:
    assert top(module_of(path)) in LAYER, "add it to LAYERS, below everything that imports it"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_dependencies_point_down(path: Path) -> None:
    own = top(module_of(path))
    used = {top(name) for name in imports(path)} - {own, "__version__"}
    upward = {name for name in used if LAYER[name] >= LAYER[own]}
    assert not upward, f"{own} (layer {LAYER[own]}) must not import {sorted(upward)}"


@pytest.mark.parametrize("folder", sorted(PARTS))
def test_parts_of_one_kind_do_not_know_each_other(folder: str) -> None:
    for path in (SOURCE / folder).glob("*.py"):
        inside = {name for name in imports(path) if top(name) == folder}
        assert not inside, f"{relative(path)} imports {sorted(inside)}"


def classes_of(folder: str) -> set[str]:
    return {
        node.name
        for path in (SOURCE / folder).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def test_the_trainer_names_no_method_and_no_model() -> None:
    parts = {
        name for folder in ("objectives", "estimators", "models") for name in classes_of(folder)
    }
    assert {"MatchingObjective", "Guess", "ResidualDB", "StableDiffusionPolicy"} <= parts
    tree = ast.parse((SOURCE / "trainer.py").read_text(encoding="utf-8"))
    named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    named |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    named |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert not named & parts


@pytest.mark.parametrize("folder", ["objectives", "estimators"])
def test_objectives_see_protocols_only(folder: str) -> None:
    for path in (SOURCE / folder).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not {"diffusers", "transformers", "peft"} & third_party(text), relative(path)


def third_party(text: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("module", ["types", "kernels", "rollout", "lookahead", "value_gradient"])
def test_the_core_needs_torch_only(module: str) -> None:
    text = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
    assert third_party(text) - set(sys.stdlib_module_names) <= {"torch"}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_starts_without_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -------------------------------------------------------------------------------- length


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def test_length_leaves_the_docstring_out() -> None:
    (function,) = ast.parse('def f():\n    """One\n\n    two."""\n    a = 1\n    return a').body
    assert isinstance(function, ast.FunctionDef) and length(function) == 3


@pytest.mark.parametrize("folder", ["src", "tools", "tests", "benchmarks"])
def test_functions_are_short(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": length(node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and length(node) > LONGEST
    }
    assert not long
