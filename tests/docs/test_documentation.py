"""What the documentation says is so: examples run, names exist, links lead somewhere."""

import ast
import doctest
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import jaxsparse

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


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_python_in_a_page_is_python(path):
    for code in blocks(path, "python"):
        ast.parse(code)


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
        if re.match(r"\w+:", target) or target.endswith("catalogue.md"):
            continue  # the catalogue is made when the site is built, which checks links to it
        assert (path.parent / target).exists(), target


def test_every_method_that_pages_link_to_is_registered():
    for path in PAGES:
        for name in re.findall(r"catalogue\.md#(\w+)", path.read_text()):
            assert name in jaxsparse.METHODS, (path.name, name)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    catalogue = (tmp_path / "reference" / "catalogue" / "index.html").read_text()
    missing = [name for name in jaxsparse.METHODS if f'id="{name}"' not in catalogue]
    assert missing == []
