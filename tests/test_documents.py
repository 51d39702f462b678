"""The documentation is true: examples run, links lead somewhere, names, files, commands exist."""

import importlib
import re

import pytest

from randlora.files.commands import main
from tests.support.pages import FENCE, ROOT, python_blocks

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "evidence" / "README.md",
    *DOCS,
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def anchors(page):
    """The anchors of the headings of a page, as links use them."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def links(page):
    return [link for _, link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page))]


# Lightning builds a leaf by a class that torch is about to remove, and advises more processes.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # of torch 2.9 itself
@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_the_examples_run(page, tmp_path, monkeypatch):
    """From top to bottom, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


def test_the_readme_has_examples():
    assert len(list(python_blocks(ROOT / "README.md"))) >= 2


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


@every_page
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"\w+:", link):
            continue  # a page on the web
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_docs_can_be_reached():
    reached = {
        (page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)
    }
    assert set(DOCS) <= reached


@every_page
def test_the_names_that_are_mentioned_exist(page):
    for name in set(re.findall(r"\brandlora((?:\.[A-Za-z_]\w*)+)", page.read_text())):
        found = importlib.import_module("randlora")
        path = "randlora"
        for part in name[1:].split("."):
            path = f"{path}.{part}"
            if not hasattr(found, part):
                try:
                    importlib.import_module(path)
                except ModuleNotFoundError:
                    pytest.fail(f"{page.name} mentions randlora{name}, but there is no {path}")
            found = getattr(found, part)


@every_page
def test_the_files_that_are_mentioned_exist(page):
    for name in set(re.findall(r"`((?:randlora|benchmarks|tests)/[\w./]*)`", page.read_text())):
        assert (ROOT / name).exists(), name


@every_page
def test_the_commands_that_are_mentioned_exist(page, capsys):
    for command, rest in re.findall(r"python -m randlora (\w+)([^\n`]*)", page.read_text()):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0, command
        usage = capsys.readouterr().out
        for option in re.findall(r"--[\w-]+", rest):
            assert option in usage, f"{command} {option}"
