"""The few pieces of HTML that the report is built of; every text is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Cell:
    """A table cell's text and its CSS class."""

    text: object
    style: str = ""


def table(headings: Sequence[str], lines: Sequence[Sequence[object]], emphasise: str | None = None) -> str:
    """A table; lines whose first cell is `emphasise` stand out."""
    styles = [_style(cell) for cell in lines[0]] if lines else [""] * len(headings)
    head = "".join(
        _element("th", heading, "text" if "text" in style else "") for heading, style in zip(headings, styles)
    )
    body = "".join(
        f"<tr{' class=ours' if _text(line[0]) == emphasise else ''}>{''.join(map(_cell, line))}</tr>" for line in lines
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tile(value: str, caption: str) -> str:
    """A number and what it is."""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(caption)}</span></div>'


def tiles(content: Sequence[str]) -> str:
    """Tiles side by side."""
    return f'<div class="tiles">{"".join(content)}</div>' if content else ""


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, style: str = "") -> str:
    return _element("p", text, style)


def note(text: str) -> str:
    """A paragraph in small print."""
    return _element("p", text, "note")


def bullets(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(_element("li", text, "") for text in texts) + "</ul>"


def definitions(entries: Mapping[str, object]) -> str:
    """Names and values, one a line."""
    lines = (
        _element("dt", name, "") + _element("dd", ", ".join(value) if isinstance(value, list) else str(value), "")
        for name, value in entries.items()
    )
    return f"<dl>{''.join(lines)}</dl>"


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def page(title: str, style: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def _cell(value: object) -> str:
    return _element("td", _text(value), _style(value))


def _element(name: str, text: str, style: str) -> str:
    attribute = f' class="{style}"' if style else ""
    return f"<{name}{attribute}>{escape(text)}</{name}>"


def _style(value: object) -> str:
    """A cell's own style; plain strings that do not start with a number are text."""
    if isinstance(value, Cell):
        return value.style
    return "text" if isinstance(value, str) and value.strip("+-")[:1].isalpha() else ""


def _text(value: object) -> str:
    return str(value.text if isinstance(value, Cell) else value)
