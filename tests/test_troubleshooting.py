"""The troubleshooting page: what it quotes is what the package says."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import diffq

PACKAGE = Path(diffq.__file__).parent
PAGE = PACKAGE.parent / "docs" / "troubleshooting.md"
TEXT = PAGE.read_text(encoding="utf-8")

#: Each `###` section of the page: its heading and what is below.
ENTRIES = re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE)
QUOTES = re.findall(r"^```text\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def _plain(text):
    """A message with single spaces, and `...` for placeholders and a full stop after one."""
    return " ".join(re.sub(r"\.{3,}", "...", text).split())


def _template(node):
    """The text of a string, `...` for what an f-string fills in; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) or "..." for part in node.values)
    return None


def _templates():
    """All strings of the package, docstrings left out."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            text = _template(node)
            if text and id(node) not in statements:
                yield _plain(text)


TEMPLATES = set(_templates())


def _is_said(quote):
    """Whether a message is in the sources, whole or a part without its end or beginning."""
    wanted = _plain(quote).removesuffix("...").rstrip()
    return wanted != "" and any(wanted in template for template in TEMPLATES)


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: _plain(quote)[:60])
def test_quotes_are_in_the_sources(quote):
    """Every message that the page quotes is one that the package can raise or print."""
    assert _is_said(quote)


@pytest.mark.parametrize(
    "quote",
    [
        "The model has a quantizer already. Remove it.",
        "The pattern 'head' matches no parameter.",
        "Every error of diffq",
        "... must be a whole number between ... and ..., got ...",
        "...",
    ],
    ids=["other remedy", "no placeholder", "docstring", "other words", "no words"],
)
def test_other_quotes_would_be_found_out(quote):
    """A message that the package does not have is not found in it."""
    assert not _is_said(quote)


@pytest.mark.parametrize(("heading", "body"), ENTRIES, ids=[heading for heading, _ in ENTRIES])
def test_entries_are_complete(heading, body):
    """Every entry gives a message, its cause and the remedy."""
    assert "```text\n" in body or "own error" in body
    assert ("**Cause.**" in body) == ("```text\n" in body)
    assert "**Remedy.**" in body


def test_entries_can_be_linked():
    """The page has entries, and no two share a heading, which is their address."""
    assert len(ENTRIES) >= 25
    assert max(Counter(heading for heading, _ in ENTRIES).values()) == 1
