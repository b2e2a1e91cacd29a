"""What the pages point to is there: files and headings in the pages that Sphinx does not build,
and names of the library in all of them."""

import importlib
import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT

#: Read in the source tree, where nothing checks them.
PLAIN = sorted(ROOT.glob("*.md"))
_FENCED = re.compile(r"^```.*?^```", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NAME = re.compile(r"`(pyublk(?:\.\w+)+)(?:\([^`]*\))?`")
#: The changelog tells of names that are gone.
NAMING = sorted({page for page in (*PLAIN, *PAGES) if page.name != "CHANGELOG.md"})
LOGGERS = {
    name
    for source in (ROOT / "src").rglob("*.p*")
    if source.suffix in (".py", ".pyx", ".pxi")
    for name in re.findall(r'getLogger\("([\w.]+)"\)', source.read_text())
}


def headings(page: Path) -> set[str]:
    """The anchors of a page, as forges and MyST make them of its headings."""
    found = re.findall(r"^#+ (.*)", _FENCED.sub("", page.read_text()), re.M)
    texts = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found)
    return {text.replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCED.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}, and there is no such file"
        assert not anchor or anchor in headings(target), f"{page.name}: {link} is no heading"


@pytest.mark.parametrize(
    "page", [page for page in NAMING if _NAME.search(page.read_text())], ids=lambda p: p.name
)
def test_names_exist(page: Path) -> None:
    for name in _NAME.findall(page.read_text()):
        assert name in LOGGERS or resolves(name), f"{page.name} names {name}, which does not exist"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what a module or a class has."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_a_name_that_does_not_exist_is_found() -> None:
    assert resolves("pyublk.testing.Disk.pread")
    assert not resolves("pyublk.testing.Disk.peruse")
    assert not resolves("pyublk.tasting")
