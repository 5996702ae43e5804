"""A page of text, tables and plots, written as Markdown and as one HTML file that needs no other. The
report of a training is one (`training.py`)."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
tr:last-child td { border-bottom: 1px solid #888 }
figure { display: inline-block; margin: .5rem 0; vertical-align: top } img { max-width: 100% }
figcaption { font-size: .85rem; color: #555; max-width: 42rem } code { background: #f3f3f3 }
"""


class Page:
    """Collects the parts in order; `write` renders them.

    Example:
      >>> import pathlib, tempfile
      >>> page = Page("A run")
      >>> page.text("It ended well.")
      >>> page.table(["layer", "kept"], [["first", 10]])
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     print(page.write(directory)[0].read_text())
      # A run
      <BLANKLINE>
      It ended well.
      <BLANKLINE>
      | layer | kept |
      | :--- | ---: |
      | first | 10 |
      <BLANKLINE>
    """

    def __init__(self, title: str):
        self.title = title
        self._parts: list[tuple[str, Any]] = []

    def heading(self, text: str) -> None:
        self._parts.append(("heading", text))

    def text(self, text: str) -> None:
        self._parts.append(("text", text))

    def code(self, text: str) -> None:
        self._parts.append(("code", text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(header)}")
        self._parts.append(("table", ([*header], [[str(cell) for cell in row] for row in rows])))

    def figure(self, figure: Figure, name: str, caption: str) -> None:
        """`name` becomes `plots/name.png`; `caption` says what to see."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self._parts.append(("figure", (buffer.getvalue(), name, caption)))

    def write(self, directory: str | pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
        """Writes `report.md` with `plots/*.png`, and `report.html`; returns the two paths."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for kind, part in self._parts:
            if kind == "figure":
                (directory / "plots").mkdir(exist_ok=True)
                (directory / "plots" / f"{part[1]}.png").write_bytes(part[0])
        markdown, page = directory / "report.md", directory / "report.html"
        markdown.write_text(self.markdown())
        page.write_text(self.html())
        return markdown, page

    def markdown(self) -> str:
        render = {
            "heading": lambda text: f"## {text}",
            "text": lambda text: text,
            "code": lambda text: f"```\n{text}\n```",
            "table": lambda table: markdown_table(*table),
            "figure": lambda figure: f"![{figure[2]}](plots/{figure[1]}.png)\n\n*{figure[2]}*",
        }
        parts = [f"# {self.title}", *(render[kind](part) for kind, part in self._parts)]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        def table(part):
            row = lambda tag, cells: (
                "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"
            )
            header, rows = part
            return "\n".join(
                ["<table>", row("th", header), *(row("td", r) for r in rows), "</table>"]
            )

        def figure(part):
            png, _, caption = part
            data, caption = base64.b64encode(png).decode(), html.escape(caption)
            return (
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )

        render = {
            "heading": lambda text: f"<h2>{html.escape(text)}</h2>",
            "text": lambda text: f"<p>{html.escape(text)}</p>",
            "code": lambda text: f"<pre><code>{html.escape(text)}</code></pre>",
            "table": table,
            "figure": figure,
        }
        title = html.escape(self.title)
        body = "\n".join(render[kind](part) for kind, part in self._parts)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
        )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The first column to the left, the others to the right.

    Example:
      >>> print(markdown_table(["method", "accuracy"], [["rigl", 0.9]]))
      | method | accuracy |
      | :--- | ---: |
      | rigl | 0.9 |
    """
    line = lambda cells: "| " + " | ".join(str(c) for c in cells) + " |"
    return "\n".join(
        [line(header), line([":---", *["---:"] * (len(header) - 1)]), *map(line, rows)]
    )
