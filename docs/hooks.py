"""What the site takes from elsewhere: the catalogue of methods from the registry, the folders of
kernels and results as they are, the changelog and the guide for contributors from the root."""

import inspect
import pathlib
import re

import griffe
from mkdocs.structure.files import File

import jaxsparse

ROOT = pathlib.Path(__file__).parent.parent
DYNAMICS = {
    "none": "dense",
    "fixed": "masks that never change",
    "gradual": "dense at first, masks that grow sparser",
    "dynamic": "masks that change at a constant budget",
    "projected": "masks that follow dense raw weights at every step",
}


def fence(text: str) -> str:
    """Examples that stand in the text of a docstring as code blocks: Markdown takes `>>>` for
    quotations."""
    block = r"(?<![^\n])(?P<pad> *)>>> .*(?:\n(?! *\n) *\S.*)*"
    return re.sub(
        block, lambda m: f"{m['pad']}```pycon\n{m[0]}\n{m['pad']}```", text
    ) if not re.search(r"^ *Examples:$", text, re.M) else text  # fmt: skip


class Doctests(griffe.Extension):
    """Applies `fence` to every docstring that mkdocstrings renders."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)


def on_config(config):
    """`kernels/` in the navigation stands for the pages of that folder; pages of others that are not
    there yet are left out."""
    docs = pathlib.Path(config.docs_dir)
    made = {"reference/catalogue.md", "changelog.md", "contributing.md"}

    def expand(entry):
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            if isinstance(value, str) and value.endswith("/"):
                value = [f"{value}{p.name}" for p in sorted((docs / value).glob("*.md"))]
                value.sort(key=lambda page: not page.endswith("index.md"))
            elif isinstance(value, list):
                value = [e for e in map(expand, value) if e]
            elif value not in made and not (docs / value).exists():
                raise SystemExit(f"mkdocs.yml: docs/{value} does not exist")
            return {title: value} if value else None
        return entry if entry in made or (docs / entry).exists() else None

    config.nav = [e for e in map(expand, config.nav) if e]
    config.nav += [{"Changelog": "changelog.md"}, {"Contributing": "contributing.md"}]
    return config


def on_files(files, config):
    pages = {
        "reference/catalogue.md": catalogue(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, **kwargs):
    """The table of all methods needs the room of the table of contents."""
    if page.file.src_uri == "methods.md":
        page.meta["hide"] = ["toc"]
    return markdown


def catalogue() -> str:
    """One section per method: what the registry knows of it, its formulas, its options."""
    kinds = list(DYNAMICS)
    methods = dict(
        sorted(jaxsparse.METHODS.items(), key=lambda m: (kinds.index(m[1].dynamics), m[0]))
    )
    lines = [
        "# Methods: formulas and options",
        "",
        "Written from the registry, `jaxsparse.METHODS`: what is listed here can be called, is run "
        "through the contract tests, and can be compared by `experiments.studies.compare`. Names of options "
        "that several methods share are explained in [Options](../guides/options.md).",
        "",
        "| name | kind | asked for a sparsity | structures |",
        "| :--- | :--- | :--- | :--- |",
    ]
    for name, m in methods.items():
        asked = "yes" if m.controls_sparsity else "no"
        kind = DYNAMICS[m.dynamics]
        lines.append(f"| [`{name}`](#{name}) | {kind} | {asked} | {m.structures} |")
    for name, m in methods.items():
        source = [f"**Source.** {m.reference}."] if m.reference else []
        facts = [
            *source,
            f"**Kind.** {DYNAMICS[m.dynamics]}"
            + ("; keeps dense raw weights" if m.keeps_raw else "")
            + (f"; {m.dense_phase}" if m.dense_phase else "")
            + ".",
        ]
        call = f"jaxsparse.{m.fn.__name__}" if hasattr(jaxsparse, m.fn.__name__) else (
            f"jaxsparse.methods.{m.fn.__name__}"
        )  # fmt: skip
        lines += ["", f"## `{name}` {{ #{name} }}", "", *_block(_signature(call, m.fn)), ""]
        lines += ["  \n".join(facts), "", _docstring(m.fn)]
    return "\n".join(lines) + "\n"


def _signature(call, fn) -> str:
    parameters = inspect.signature(fn).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    parts, starred = [], False
    for p in plain:
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        parts.append(str(p))
    text = f"{call}({', '.join(parts)})"
    return text if len(text) <= 88 else f"{call}(\n    " + ",\n    ".join(parts) + ",\n)"


def _block(code: str) -> list[str]:
    return ["```python", code, "```"]


def _docstring(fn) -> str:
    """The docstring as Markdown: text and formulas as they are, sections as lists."""
    doc = griffe.Docstring(fence(inspect.cleandoc(fn.__doc__ or "")), lineno=1)
    out = []
    for section in griffe.parse_google(doc, warnings=False):
        kind = section.kind.value
        if kind == "text":
            out.append(section.value)
        elif kind == "parameters":
            rows = [f"- `{p.name}`: {_oneline(p.description)}" for p in section.value]
            out.append("**Arguments**\n\n" + "\n".join(rows))
        elif kind == "raises":
            rows = [f"- `{e.annotation}`: {_oneline(e.description)}" for e in section.value]
            out.append("**Raises**\n\n" + "\n".join(rows))
        elif kind == "returns":
            out.append("**Returns** " + " ".join(_oneline(e.description) for e in section.value))
        elif kind == "examples":
            for part, text in section.value:
                example = part.value == "examples"
                out.append("\n".join(["```pycon", text, "```"]) if example else text)
        else:
            out.append(f"{section.title or kind}: {getattr(section.value, 'description', '')}")
    return "\n\n".join(out)


def _oneline(text: str) -> str:
    return " ".join(text.split())
