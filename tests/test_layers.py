"""The architecture: dependencies point down only, functions are short, torch loads only if used."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import nablagfn

SOURCE = Path(nablagfn.__file__).parent
ROOT = Path(__file__).parent.parent
LONGEST = 60  # lines of a function, its docstring left out

LAYERS = (  # a folder imports those of the lines above its own; none of its own line
    {"config"},
    {"runs"},
    {"metrics", "runtime"},
    {"core"},
    {"models", "rewards", "worlds", "prompts"},
    {"families", "methods"},
    {"report", "recipes", "evaluation"},
    {"training"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__", "moved"},
)
LAYER = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
PARTS = ("methods/objectives", "methods/estimators", "metrics")  # whose files know no other
SHARED = {"metrics.groups"}  # but this one
TORCH_FREE = ("cli", "report", "recipes", "runs", "config")  # every file of these folders
RECORDS = ("methods.registry", "families.registry", "core.samplers")  # and these

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


def test_the_import_reader_sees_imports() -> None:
    code = "from ..config import Config\nfrom . import flow\nimport nablagfn.core.rng\nimport torch"
    found = [t for node in ast.parse(code).body for t in targets(node, ("nablagfn", "models"))]
    assert found == ["config.Config", "models.flow", "core.rng"]
    guess = SOURCE / "methods" / "estimators" / "guess.py"
    assert "core.lookahead.guess" in imports(guess)


def test_a_folder_imports_lower_ones_only() -> None:
    assert {top(module_of(path)) for path in FILES} == set(LAYER), "LAYERS names every folder"
    for path in FILES:
        own = top(module_of(path))
        used = {top(name) for name in imports(path)} - {own, "__version__"}
        if own == "__init__":
            continue  # it is above all
        beside = {name for name in used if LAYER[name] >= LAYER[own]}
        assert not beside, f"{relative(path)} must not import {sorted(beside)}"


def modules() -> dict[str, set[str]]:
    """Which modules of nablagfn each module imports, at its top or inside a function."""
    known = {module_of(path): path for path in FILES}
    found = {}
    for name, path in known.items():
        used = {u if u in known else u.rpartition(".")[0] for u in imports(path)} & set(known)
        found[name] = {u for u in used if u != name and not name.startswith(f"{u}.")}
    return found


def test_no_module_is_imported_in_a_circle() -> None:
    graph = modules()
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(graph) > 100


def test_tools_are_not_imported_in_a_circle() -> None:
    graph = {}
    for path in (ROOT / "tools").glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        graph[path.stem] = {n.module for n in tree if isinstance(n, ast.ImportFrom) and n.module}
    assert list(TopologicalSorter(graph).static_order()) and "proofs" in graph


def test_every_class_has_a_name_of_its_own() -> None:
    found = [name for path in FILES for name in classes_in(path)]
    assert sorted(found) == sorted(set(found))


def test_only_a_family_knows_its_model() -> None:
    """Elsewhere nobody names Stable Diffusion, or asks whether something is a world."""
    homes = {"models", "families", "worlds", "__init__", "moved"}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        known = {name for name in names if name == "is_world" or name.startswith("StableDiffusion")}
        assert not known or top(module_of(path)) in homes, f"{relative(path)}: {sorted(known)}"


def test_parts_of_one_kind_do_not_know_each_other() -> None:
    for folder in PARTS:
        for path in (SOURCE / folder).glob("*.py"):
            prefix = folder.replace("/", ".") + "."
            inside = {name for name in imports(path) if name.startswith(prefix)}
            inside = {name for name in inside if name.rpartition(".")[0] not in SHARED}
            assert not inside, f"{relative(path)} imports {sorted(inside)}"


def classes_in(path: Path) -> list[str]:
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.name for node in tree if isinstance(node, ast.ClassDef)]


def classes_of(folder: str) -> set[str]:
    return {name for path in (SOURCE / folder).glob("*.py") for name in classes_in(path)}


def test_the_trainer_names_no_method_and_no_model() -> None:
    folders = ("methods/objectives", "methods/estimators", "models")
    parts = {name for folder in folders for name in classes_of(folder)}
    assert {"MatchingObjective", "Guess", "ResidualDB", "StableDiffusionPolicy"} <= parts
    tree = ast.parse((SOURCE / "training" / "trainer.py").read_text(encoding="utf-8"))
    named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    named |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    named |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert not named & parts


def test_methods_see_protocols_only() -> None:
    for path in (SOURCE / "methods").rglob("*.py"):
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


def test_the_core_needs_torch_only() -> None:
    for path in (SOURCE / "core").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert third_party(text) - set(sys.stdlib_module_names) <= {"torch"}, path.name


def test_what_needs_no_torch_starts_without() -> None:
    names = [name for name in map(module_of, FILES) if top(name) in TORCH_FREE]
    names += RECORDS
    assert len(names) > 30
    lines = [f"import nablagfn.{name}" for name in ("__init__", *names)]
    code = "\n".join([*lines, "import sys; sys.exit('torch' in sys.modules)"])
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
