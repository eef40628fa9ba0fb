"""Pages of the documents of which a script writes a part."""

from __future__ import annotations

from pathlib import Path


def insert_between(page: Path, start: str, text: str, end: str) -> None:
    """Put a text, which has both marks, where the page has them. Raises ValueError without them."""
    before = page.read_text(encoding="utf-8")
    head, begins, rest = before.partition(start)
    _, ends, tail = rest.partition(end)
    if not begins or not ends:
        raise ValueError(f"{page} has no lines '{start}' and '{end}'")
    page.write_text(head + text + tail, encoding="utf-8")
