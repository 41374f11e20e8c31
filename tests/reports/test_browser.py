"""Pages in a real browser: they fit phones, load nothing, run no code of a file, and sort."""

import pytest

from diffq.reports.comparison import comparison_page
from diffq.reports.model import model_page
from tests.reports.browser import browser
from tests.reports.samples import HOSTILE, hostile, reader

_TAB, _SPACE = "\ue004", " "


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser."""
    with browser(tmp_path_factory.mktemp("browser")) as session:
        yield session


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name."""
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "one": model_page(reader(), "model.diffq"),
        "two": comparison_page(reader(), reader(small=True), ("old.diffq", "new.diffq")),
        "apart": comparison_page(reader(), hostile(), ("old.diffq", "new.diffq")),
        "hostile": model_page(hostile(), HOSTILE[0]),
    }
    for name, page in made.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["one", "two", "apart", "hostile"])
def test_pages_fit_and_load_nothing(chromium, pages, name, width, dark):
    """No page scrolls sideways, complains on the console, asks for anything, or runs its names."""
    path = pages / f"{name}.html"
    chromium.open(path, width, dark=dark)
    assert chromium.requests() == [path.as_uri()]
    assert chromium.log("browser") == []
    assert chromium.run("return document.documentElement.scrollWidth") <= width
    assert "diffq report" in chromium.run("return document.title")
    wide = """
        return [...document.querySelectorAll("main *")].filter((element) => {
          const box = element.getBoundingClientRect();
          const outside = box.left < 0 || box.right > innerWidth;
          return outside && box.width && !element.closest(".scroll");
        }).map((element) => element.outerHTML.slice(0, 200));"""
    assert chromium.run(wide) == []
    picture = pages / f"{name}-{width}.png"
    chromium.screenshot(picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_follow_the_scheme(chromium, pages, dark):
    """The page and its letters are dark on light, or light on dark, as the reader's system is."""
    chromium.open(pages / "one.html", 390, dark=dark)
    colors = """
        const style = getComputedStyle(document.body);
        return [style.backgroundColor, style.color].map((color) =>
          color.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0));"""
    page, letters = chromium.run(colors)
    assert (page < letters) is dark
    assert abs(page - letters) > 500


_COLUMN = """
    const table = document.querySelectorAll("table.sortable")[arguments[0]];
    return [...table.tBodies[0].rows].map((row) => row.cells[arguments[1]].textContent);"""
_ORDER = """
    const table = document.querySelectorAll("table.sortable")[arguments[0]];
    return [...table.tHead.rows[0].cells].map((head) => head.getAttribute("aria-sort"));"""
_PRESS = """
    const table = document.querySelectorAll("table.sortable")[arguments[0]];
    table.tHead.rows[0].cells[arguments[1]].querySelector("button").click();"""


def test_a_click_sorts(chromium, pages):
    """A heading sorts numbers from high to low and names from a to z, and then the other way."""
    chromium.open(pages / "one.html", 1200)
    names, sizes = (chromium.run(_COLUMN, 1, column) for column in (0, 2))
    assert chromium.run(_ORDER, 1)[2] == "descending"
    assert [int(size.replace(",", "")) for size in sizes] == sorted(
        (int(size.replace(",", "")) for size in sizes), reverse=True
    )
    chromium.run(_PRESS, 1, 2)
    assert chromium.run(_COLUMN, 1, 2) == sizes[::-1]
    assert chromium.run(_ORDER, 1)[2] == "ascending"
    for wanted in (sorted(names), sorted(names, reverse=True)):
        chromium.run(_PRESS, 1, 0)
        assert chromium.run(_COLUMN, 1, 0) == wanted
    assert [order for order in chromium.run(_ORDER, 1) if order] == ["descending"]


def test_numbers_that_are_missing_come_last(chromium, pages):
    """Rows without a number stay below the others, in both orders."""
    chromium.open(pages / "apart.html", 1200)
    shown = []
    for _ in range(2):
        chromium.run(_PRESS, 0, 1)
        shown.append(chromium.run(_COLUMN, 0, 1))
    assert shown[0] != shown[1]
    for column in shown:
        missing = [cell == "-" for cell in column]
        assert missing == sorted(missing)
        assert 0 < sum(missing) < len(missing)


def test_keys_sort(chromium, pages):
    """The headings are reached by tab and pressed by space."""
    chromium.open(pages / "one.html", 1200)
    focus = "const table = document.querySelectorAll('.scroll')[1]; table.focus();"
    chromium.run(focus)
    before = chromium.run(_COLUMN, 1, 0)
    chromium.press(_TAB, _SPACE)
    assert chromium.run(_ORDER, 1)[0] == "ascending"
    chromium.press(_SPACE)
    assert chromium.run(_ORDER, 1)[0] == "descending"
    assert chromium.run(_COLUMN, 1, 0) == sorted(before, reverse=True)
