"""What the documentation says is so: examples run, names exist, links lead somewhere."""

import doctest
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import jaxsparse
from jaxsparse.methods import registry

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "colab" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(path, language):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("path", [p for p in PAGES if ">>> " in p.read_text()], ids=str)
def test_examples_of_a_page_run(path):
    examples = "\n".join(blocks(path, "pycon"))
    assert examples.count(">>> ") == path.read_text().count(">>> ")
    test = doctest.DocTestParser().get_doctest(examples, {}, path.name, str(path), 0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.DocTestRunner(optionflags=flags).run(test).failed == 0


WITH_CODE = [path for path in PAGES if blocks(path, "python")]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_code_of_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    """What a reader brings along (a model, a loss, data) stands in a comment of the page,
    `<!-- setup ... -->`, which is not shown."""
    monkeypatch.chdir(tmp_path)
    # What a page registers is gone after it.
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    names = {"__name__": path.stem}
    setup = re.findall(r"^<!-- setup\n(.*?)^-->", path.read_text(), flags=re.M | re.S)
    for code in (*setup, *blocks(path, "python")):
        exec(compile(code, str(path), "exec"), names)


def test_a_method_in_a_file_of_ones_own_is_known_to_comparisons(tmp_path):
    page = ROOT / "docs" / "guides" / "your_own_method.md"
    code = blocks(page, "python")
    method = "\n".join([code[0], *(c for c in code if "@register" in c)])
    (tmp_path / "my_method.py").write_text(method)
    (script,) = blocks(page, r"\{\.python title=\"compare_mine.py\"\}")
    (tmp_path / "compare_mine.py").write_text(script)
    run = subprocess.run(
        [sys.executable, "compare_mine.py", "--methods=my_method,nosuch"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert "unknown method 'nosuch'" in run.stderr
    assert "my_method" in run.stderr.split("Methods are")[1]


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_names_of_the_library_in_a_page_exist(path):
    text = re.sub(
        r"^::: .*$", "", path.read_text(), flags=re.M
    )  # the build of the site checks these
    for name in set(re.findall(r"\bjaxsparse((?:\.[A-Za-z]\w*)+)", text)):
        found = jaxsparse
        for part in name.strip(".").split("."):
            if part in ("md", "py", "json", "png"):
                break
            assert hasattr(found, part) or importlib.util.find_spec(f"{found.__name__}.{part}"), (
                name
            )
            found = getattr(found, part, None) or importlib.import_module(
                f"{found.__name__}.{part}"
            )


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_to_files_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        made = ("catalogue.md", "contributing.md", "changelog.md")
        if re.match(r"\w+:", target) or target.endswith(made):
            continue  # made when the site is built, which checks links to them
        assert (path.parent / target).exists(), target


def test_every_method_that_pages_link_to_is_registered():
    for path in PAGES:
        for name in re.findall(r"catalogue\.md#(\w+)", path.read_text()):
            assert name in jaxsparse.METHODS, (path.name, name)


def test_the_table_of_methods_is_what_the_registry_says():
    from experiments.studies import catalogue

    assert (ROOT / "docs" / "methods.md").read_text() == catalogue.table()


def test_the_site_builds_without_a_warning(tmp_path):
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    catalogue = (tmp_path / "reference" / "catalogue" / "index.html").read_text()
    missing = [name for name in jaxsparse.METHODS if f'id="{name}"' not in catalogue]
    assert missing == []
