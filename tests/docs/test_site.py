"""The site that `make docs` built: the whole API is on it, and it loads nothing from elsewhere."""

import inspect
import os
import re
from pathlib import Path

import pytest

import diffq

# Set by `make docs`: a site from before a change would say nothing about it.
if "DIFFQ_SITE" not in os.environ:
    pytest.skip("no site was built: run `make docs`", allow_module_level=True)

SITE = Path(os.environ["DIFFQ_SITE"])
PAGES = {path.relative_to(SITE): path.read_text("utf-8") for path in SITE.rglob("*.html")}
IDS = {found for text in PAGES.values() for found in re.findall(r'id="(diffq\.[\w.]+)"', text)}


def _members(owner):
    """Names of the public methods and properties that a class has from classes of diffq."""
    for base in owner.__mro__:
        if base.__module__.startswith("diffq"):
            for name, value in vars(base).items():
                is_member = isinstance(value, property | classmethod | staticmethod)
                if not name.startswith("_") and (is_member or inspect.isfunction(value)):
                    yield name


@pytest.mark.parametrize("name", sorted(diffq._LAZY))
def test_every_name_is_in_the_reference(name):
    """Each public name, and each public method of it or of every quantizer, has its entry."""
    assert f"diffq.{name}" in IDS
    value = getattr(diffq, name)
    if inspect.isclass(value):
        owners = [f"diffq.{base.__name__}" for base in value.__mro__]
        owners.append("diffq.quantizers.base.BaseQuantizer")
        missing = [
            member
            for member in _members(value)
            if not any(f"{owner}.{member}" in IDS for owner in owners)
        ]
        assert missing == []


@pytest.mark.parametrize("page", sorted(PAGES), ids=str)
def test_page_loads_nothing_from_elsewhere(page):
    """No script, style, font, frame or picture of a page has the address of a server."""
    tags = re.findall(r"<(?!a\b)[a-z]+\b[^>]*", PAGES[page])
    assert [tag for tag in tags if re.search(r"(src|href)=[\"']?(https?:)?//", tag)] == []


@pytest.mark.parametrize("path", sorted(SITE.rglob("*.css")), ids=lambda path: path.name)
def test_styles_load_nothing_from_elsewhere(path):
    """No style imports another one, a font or a picture from a server."""
    assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text("utf-8"))
