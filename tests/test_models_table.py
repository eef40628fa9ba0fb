"""tools/models_table.py: what it writes into the page (counting all takes a quarter of an hour)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nablagfn.models.published import PUBLISHED
from nablagfn.recipes.options import load_config

FILE = Path(__file__).parent.parent / "tools" / "models_table.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_table", FILE)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(FILE.parent))
    monkeypatch.setitem(sys.modules, "models_table", found)
    spec.loader.exec_module(found)
    return found


def test_its_recipes_are_of_published_architectures(tool: ModuleType) -> None:
    assert all(load_config(name).pretrained.model in PUBLISHED for name in tool.RECIPES)


def test_a_row_says_what_fits_and_only_the_marked_part_is_written(
    tool: ModuleType, tmp_path: Path
) -> None:
    row = {
        "recipe": "sd35",
        "network": 2.24e9,
        "encoders": 5.58e9,
        "lora": 23.8e6,
        "latents": [16, 64, 64],
        "paths": 4,
        **{card.name: None for card in tool.CARDS},
    }
    row[tool.CARDS[1].name] = {"peak": 35.2, "seconds": 3.84}
    made = tool.table([row])
    assert made.splitlines()[2] == (
        "| `sd35` | 2.24 B | 5.58 B | 23.8 M | 16×64×64 | 4 | does not fit | 35 GB, 3.8 s "
        "| does not fit |"
    )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tool.MARK}\nold\n{tool.MARK}\nafter\n", encoding="utf-8")
    tool.insert_between(page, tool.MARK, f"{tool.MARK}\n{made}\n{tool.MARK}", tool.MARK)
    known = f"before\n{tool.MARK}\n{made}\n{tool.MARK}\nafter\n"
    assert page.read_text(encoding="utf-8") == known
    page.write_text(one := f"before\n{tool.MARK}\nafter\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no lines"):  # and loses none
        tool.insert_between(page, tool.MARK, made, tool.MARK)
    assert page.read_text(encoding="utf-8") == one


def test_the_page_has_every_row(tool: ModuleType) -> None:
    page = tool.DOC.read_text(encoding="utf-8")
    assert page.count(tool.MARK) == 2
    inside = page.split(tool.MARK)[1]
    assert all(f"| `{name}` |" in inside for name in tool.RECIPES)
