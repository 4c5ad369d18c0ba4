"""report.html is one file: it asks for nothing, runs nothing but its sorting, and is readable on a phone."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fake_run
from browser import PROGRAM, browser
from smbench import report
from smbench.page import render_page

LOADING = {"src", "srcset", "data", "poster", "background", "action", "formaction", "manifest", "ping", "archive"}
"""Attributes whose address a browser fetches by itself, or sends something to."""
NETWORK = (
    r"fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import|eval|Function|innerHTML|document\.write|location"
)


REFUSED = """new Promise((resolve) => {{
  document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective), {{ once: true }});
  {}
}})"""
"""Which rule of the page's policy stops what an injected script would do."""


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run in which every status occurs, hostile strings included, with its folder taken away."""
    folder = fake_run.build(
        tmp_path_factory.mktemp("runs") / "run", fake_run.RECIPE, "full", fake_run.every_status, [fake_run.GPU]
    )
    report.render(folder)
    alone = tmp_path_factory.mktemp("alone") / "report.html"
    alone.write_bytes((folder / "report.html").read_bytes())
    return alone


def test_it_names_nothing_that_would_be_fetched(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    elements = Elements(text).found
    addresses = [value for _, attributes in elements for name, value in attributes.items() if name in LOADING]
    assert addresses and all(value and value.startswith("data:image/png;base64,") for value in addresses)
    assert {tag for tag, _ in elements}.isdisjoint(
        {"link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    )
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_its_figures_are_the_files_of_the_run(page: Path) -> None:
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text(encoding="utf-8"))
    assert len(images) > 5
    assert all(base64.b64decode(image, validate=True).startswith(b"\x89PNG") for image in images)


def test_its_policy_allows_no_request_and_its_own_script_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    policy = next(a["content"] for tag, a in Elements(text).found if tag == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'; img-src data:; ")
    assert "http" not in policy and "*" not in policy and "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    script = text.split("<script>")[1].split("</script>")[0]
    assert not re.search(NETWORK, script)


def test_an_image_that_is_no_figure_of_the_run_is_its_text() -> None:
    text = "![a figure](figures/a.png) ![tracker](https://x.example/t.png) ![file](/etc/passwd) ![b](figures/b.png)"
    page = render_page(text, "title", {"figures/a.png": b"\x89PNG"})
    assert page.count("<img") == 1
    assert 'alt="a figure"' in page
    assert "[tracker]" in page and "[file]" in page and "[b]" in page
    assert "x.example" not in page and "passwd" not in page


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_a_request_sorts_its_tables_and_fits_a_phone(page: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        for width in (390, 1200):
            tab.open(page, width)
            assert tab.value("document.scrollingElement.scrollWidth") <= width
            assert tab.value("[...document.images].every((image) => image.complete && image.naturalWidth > 100)")
        assert tab.value("getComputedStyle(document.body).fontSize") == "16px"
        outside = [url for url in tab.requested if not url.startswith(("file:", "data:"))]
        assert not outside
        assert tab.requested.count(page.as_uri()) == 2
        table = (
            "[...document.querySelectorAll('table.sortable')].find((t) => t.tHead.textContent.includes('hidden_size'))"
        )
        column = f"[...{table}.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === 'hidden_size')"
        sizes = f"[...{table}.tBodies[0].rows].map((row) => parseInt(row.cells[{column}].textContent))"
        before = tab.value(sizes)
        click = f"{table}.tHead.rows[0].cells[{column}].click()"
        tab.value(click)
        assert tab.value(sizes) == sorted(before)
        tab.value(click)
        assert tab.value(sizes) == sorted(before, reverse=True) != sorted(before)
        assert tab.value(f"{table}.querySelectorAll('[aria-sort]').length") == 1
        assert (
            tab.value(
                REFUSED.format(
                    "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; "
                    "document.body.append(s)"
                )
            )
            == "script-src-elem"
        )
        assert tab.value("window.ran") is None
        assert tab.value(REFUSED.format("new Image().src = 'https://x.example/t.png'")) == "img-src"
