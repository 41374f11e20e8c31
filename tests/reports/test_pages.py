"""Pages about files: what they say is what the files hold, whatever their names are."""

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import numpy as np
import pytest

from diffq.format.container import encode
from diffq.format.reader import Reader
from diffq.reports.colors import letters_on, ramp
from diffq.reports.comparison import comparison_page, pairs
from diffq.reports.markup import Markup, joined, tag
from diffq.reports.model import model_page
from diffq.reports.notebook import fragment
from diffq.reports.summary import summarize
from diffq.reports.text import shortened, size
from tests.format.samples import grid, product, raw
from tests.reports.samples import HOSTILE, hostile, reader, records


class Elements(HTMLParser):
    """The elements of a page, the attributes that they have, and the text in them."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.text = [], [], {}
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.attributes += [(name, *pair) for pair in attributes]
        if name not in ("meta", "rect", "wbr"):
            self.open.append(name)
        self.text.setdefault(name, []).append("")

    def handle_startendtag(self, name, attributes):
        self.attributes += [(name, *pair) for pair in attributes]

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        for name in set(self.open):
            self.text[name][-1] += data


def _page(*files, names=("a.diffq", "b.diffq")):
    if len(files) == 1:
        return model_page(files[0], names[0])
    return comparison_page(*files, names)


PAGES = {
    "one": lambda: _page(reader()),
    "two": lambda: _page(reader(), reader(small=True)),
    "hostile": lambda: _page(hostile(), names=[HOSTILE[0]]),
    "two hostile": lambda: _page(hostile(), reader(), names=HOSTILE[:2]),
    "empty": lambda: _page(Reader(encode({}))),
    "raw alone": lambda: _page(Reader(encode({"x": raw(np.ones(3, "f4"))}))),
    "codebook alone": lambda: _page(Reader(encode({"x": product(40, 8)}))),
    "two empty": lambda: _page(Reader(encode({})), Reader(encode({}))),
    "from nothing": lambda: _page(Reader(encode({})), reader()),
}


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)
def test_pages_are_sound(make):
    """Every element is closed, and only the elements and attributes of pages are there."""
    page = make()
    found = Elements(page)
    assert found.open == []
    assert len(found.text["script"]) == 1
    assert set(found.text) <= {
        *("html", "head", "meta", "title", "style", "body", "main", "script", "header", "section"),
        *("h1", "h2", "p", "ul", "ol", "li", "dl", "div", "dt", "dd", "span", "svg", "text"),
        *("table", "thead", "tbody", "tfoot", "tr", "th", "td", "button", "details", "summary"),
        *("pre", "footer", "wbr"),
    }
    assert not {name for _, name, _ in found.attributes} & {"style", "src", "href"}
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert "http:" not in page
    assert "https:" not in page


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)
def test_policy_allows_the_page_alone(make):
    """The policy has the digests of the page's style and script, and nothing from elsewhere."""
    page = make()
    found = Elements(page)
    (policy,) = (v for e, n, v in found.attributes if (e, n) == ("meta", "content") and "src" in v)
    digests = [
        f"'sha256-{b64encode(sha256(found.text[name][0].encode()).digest()).decode()}'"
        for name in ("style", "script")
    ]
    assert policy == (
        f"default-src 'none'; style-src {digests[0]}; script-src {digests[1]}; "
        "base-uri 'none'; form-action 'none'"
    )


def test_numbers_are_those_of_the_file():
    """Size, ratio, mean bits, weights and each tensor's row are the file's."""
    file = reader()
    summary = summarize(file)
    page = _page(file)
    found = Elements(page)
    times = summary.float32_bytes / file.size
    assert found.text["p"][0] == f"{times:.1f} times smaller than float32"
    assert found.text["dd"][:3] == [f"{summary.mean_bits:.2f}", f"{summary.weights:,}", "6"]
    cells = "\n".join(found.text["td"])
    for tensor in summary.tensors:
        shown = "-" if tensor.mean_bits is None else f"{tensor.mean_bits:.2f}"
        share = f"{tensor.size / file.size:.1%}"
        name = " = ".join([tensor.name, *tensor.tied])
        assert "\n".join([name, shown, f"{tensor.size:,}", share]) in cells
    assert "head = decoder.weight" in cells
    assert found.text["pre"][0].count("\n") == 3


def test_pages_are_the_same_each_time():
    """A page has no date and nothing else that the file does not have."""
    assert _page(reader()) == _page(reader())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name):
    """Names of tensors and files, and metadata, are shown as text, cut and without controls."""
    page = _page(hostile(), names=[name])
    assert len(page) < 300_000
    assert name not in page or not set("<>\"'\u202e\x9b") & set(name)
    found = Elements(page)
    assert shortened(name, 200) == found.text["h1"][0]
    assert shortened(name, 160) in "\n".join(found.text["td"])
    assert "\ud800" not in page


def test_size_is_bounded():
    """A file of 3,000 tensors is a page of its 1,000 largest ones, and counts the others."""
    tensors = {f"layers.{i}.weight": raw(np.ones(1 + i % 3, "f4")) for i in range(2500)}
    tensors |= {f"blocks.{i}.weight": grid(64 + i % 7, seed=i) for i in range(500)}
    page = _page(Reader(encode(tensors)))
    found = Elements(page)
    assert len(page) < 1_000_000
    assert len(found.text["tr"]) < 1600
    assert any(text.startswith("and 1,500 smaller tensors, ") for text in found.text["td"])
    assert any(text.startswith("and 460 smaller tensors, ") for text in found.text["p"])


def test_pairs_are_found_by_any_name():
    """Tensors of two files meet by name or tie; the others are in one of them only."""
    a = Reader(encode({"x": grid(80), "gone": raw(np.ones(3, "f4"))}, {"y": "x"}))
    b = Reader(encode({"y": grid(80, seed=1), "new": raw(np.ones(3, "f4"))}))
    found = pairs(summarize(a), summarize(b))
    assert [(p.name, p.a is None, p.b is None, p.note) for p in found] == [
        ("x", False, False, ""),
        ("gone", False, True, "only in A"),
        ("new", True, False, "only in B"),
    ]
    assert sum(pair.change for pair in found) == sum(
        sign * tensor.size for sign, file in ((-1, a), (1, b)) for tensor in summarize(file).tensors
    )


def test_two_files_tell_what_changed():
    """The page of two files has bits and bytes of both, their differences, and what is the same."""
    a, b = reader(), reader(small=True)
    before, after = summarize(a), summarize(b)
    found = Elements(_page(a, b))
    assert found.text["p"][0] == f"B is {a.size / b.size:.1f} times smaller than A"
    cells = "\n".join(found.text["td"])
    for one, other in zip(before.tensors, after.tensors, strict=True):
        if one.counts:
            change = f"−{one.mean_bits - other.mean_bits:.2f}"
            bits = f"{one.mean_bits:.2f}", f"{other.mean_bits:.2f}", change
            bytes_ = f"{one.size:,}", f"{other.size:,}", f"−{size(one.size - other.size)}"
            assert "\n".join([one.name, *bits, *bytes_]) in cells
    same = [
        one for one, two in zip(before.tensors, after.tensors, strict=True) if one.size == two.size
    ]
    assert found.text["summary"] == [f"{len(same)} tensors of the same size"]


def test_shapes_that_changed_are_noted():
    """Another shape, dtype or kind under the same name is in the table."""
    files = [Reader(encode({"w": each})) for each in (grid(80), grid(96), raw(np.ones(96, "f4")))]
    first, second, third = map(summarize, files)
    assert [p.note for p in pairs(first, second)] == ["80 to 96"]
    assert [p.note for p in pairs(second, third)] == ["grid to raw"]
    assert [p.note for p in pairs(second, second)] == [""]


def test_markup_escapes_text_and_keeps_markup():
    """Text in elements and attributes is escaped once; elements in elements are not."""
    inner = tag("b", "<&>")
    assert inner == "<b>&lt;&amp;&gt;</b>"
    assert tag("p", inner, "\x1b", title='"<') == (
        '<p title="&quot;&lt;"><b>&lt;&amp;&gt;</b>\\x1b</p>'
    )
    assert tag("rect", width=1.5, hidden=True, id=False) == '<rect width="1.5" hidden/>'
    assert isinstance(joined("a", Markup("<i>")), Markup)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 kB"), (104857, "102.4 kB"), (104858, "0.100 MB")],
)
def test_sizes_keep_three_digits(count, shown):
    """Bytes have a unit in which they are easy to read."""
    assert size(count) == shown


@pytest.mark.parametrize("dark", [False, True])
def test_letters_can_be_read_on_each_colour(dark):
    """Letters on any bitwidth's colour have a contrast of 4.5 or more, as WCAG AA asks for."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for widths in (range(1, 16), range(2, 6), [4], [3, 4]):
        for color in ramp(widths, dark).values():
            light, deep = sorted((luminance(color), luminance(letters_on(color))), reverse=True)
            assert (light + 0.05) / (deep + 0.05) >= 4.5


def test_ramp_orders_the_bitwidths():
    """Each bitwidth has a colour of its own; unused ones leave a gap."""
    colors = ramp([2, 3, 9])
    assert list(colors) == [2, 3, 9]
    assert len(set(colors.values())) == 3
    assert ramp([]) == {}


def test_tables_of_notebooks_leave_the_middle_out():
    """A long table shows both ends and counts the rest; names are escaped."""
    rows = [(f"<{i}>", "8") for i in range(100)]
    table = fragment(("tensor", "bits"), rows, [("total", "")])
    assert table.count("<tr>") == 1 + 60 + 1 + 1
    assert "… 40 more …" in table
    assert "&lt;99&gt;" in table
    assert not re.search("<[0-9]", table)


def test_summaries_decode_in_batches(monkeypatch):
    """A summary is the same whether tensors are decoded together or one by one."""
    whole = summarize(reader())
    monkeypatch.setattr("diffq.reports.summary._BATCH_BYTES", 1)
    single = summarize(reader())
    assert single == whole
    assert [tensor.name for tensor in single.tensors] == list(records())
