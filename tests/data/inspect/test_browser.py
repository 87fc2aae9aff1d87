"""The page in a browser: Debian's Chromium, driven by Playwright."""

import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright

from tests.data.inspect.pages import PACK, Reader, encoded, report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: apt-get install -y chromium"
)


class Tab(NamedTuple):
    """An open page, the errors and warnings of its console, and the addresses that it requested."""

    page: Page
    errors: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


def new_tab(browser) -> Tab:
    tab = Tab(browser.new_page(viewport={"width": 1280, "height": 900}), [], [])

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            tab.errors.append(message.text)

    tab.page.on("console", note)
    tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.page.on("request", lambda request: tab.requests.append(request.url))
    return tab


@pytest.fixture(scope="module")
def tab(browser, page, tmp_path_factory) -> Tab:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page)
    tab = new_tab(browser)
    tab.page.goto(path.as_uri())
    expect(tab.page.locator(".codec:not([data-drawn])")).to_have_count(0)
    return tab


def test_errors_and_requests_are_noticed(browser, tmp_path):
    """The page is judged by what the tab notes, so the tab must note it."""
    tab = new_tab(browser)
    policy = "default-src 'none'; script-src 'unsafe-inline'"
    path = tmp_path / "bad.html"
    path.write_text(
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<img src="other.png"><script>console.warn("warned"); throw Error("thrown");</script>'
    )
    tab.page.goto(path.as_uri())
    assert any("warned" in text for text in tab.errors)
    assert any("thrown" in text for text in tab.errors)
    assert any("Content Security Policy" in text for text in tab.errors)
    (tmp_path / "loads.html").write_text('<img src="other.png">')
    tab.page.goto((tmp_path / "loads.html").as_uri())
    assert tab.requests[-2:] == [(tmp_path / n).as_uri() for n in ("loads.html", "other.png")]
    tab.page.close()


def test_page_loads_alone(tab):
    assert tab.errors == []
    outside = [url for url in tab.requests if not url.startswith(("file:", "data:", "about:"))]
    assert outside == [] and sum(url.startswith("file:") for url in tab.requests) == 1
    assert tab.page.evaluate("window.hacked === undefined")
    assert tab.page.evaluate(
        "[...document.images].every((i) => i.closest('dialog') || i.naturalWidth > 0)"
    )


def test_bars_are_drawn_and_packs_turn(tab, page):
    data = report(page)
    for pack in (1, 0):
        tab.page.locator("#pack-next" if pack else "#pack-back").click()
        p = data["packs"][pack]
        assert tab.page.locator("#text-rows a").count() == sum(map(len, p["rows"]))
        windows = sum(len(row) for rows in p["vision"] for row in rows)
        assert tab.page.locator("#vision-rows a").count() == windows
        assert tab.page.locator("#overview g").count() == len(data["packs"])
        n = p["rows"][0][0][0]
        drawn = tab.page.locator(f'#text-rows a[data-number="{n}"]').bounding_box()
        row = tab.page.locator("#text-rows svg").first.bounding_box()
        share = data["samples"][n]["tokens"] / PACK.seq_len
        assert drawn["width"] / row["width"] == pytest.approx(share, abs=0.01)


def test_a_click_leads_to_the_sample(tab, page):
    data, shown = report(page), Reader(page).samples
    first = [entry[0] for row in data["packs"][0]["rows"] for entry in row]
    n = next(n for n in first if n in shown)
    tab.page.evaluate("scrollTo(0, 0)")
    tab.page.locator(f'#text-rows a[data-number="{n}"]').click()
    tab.page.wait_for_function(f"location.hash === '#sample-{n}'")
    tab.page.wait_for_function(
        f"Math.abs(document.querySelector('#sample-{n}').getBoundingClientRect().top) < 500"
    )
    assert tab.page.locator(":target").get_attribute("id") == f"sample-{n}"
    expect(tab.page.locator("#picked")).to_contain_text(data["samples"][n]["id"])
    other = next(s for s in range(len(data["samples"])) if s not in shown)
    tab.page.evaluate(f"location.hash = '#sample-{other}'")
    expect(tab.page.locator("#picked")).to_contain_text("not among")
    pack = data["samples"][other]["pack"] + 1
    expect(tab.page.locator("#pack-name")).to_have_text(re.compile(rf"^pack {pack} of"))


def test_codec_frames_are_drawn(tab, page, corpus):
    """The drawn frame has the chosen blocks at full brightness and the anchor dimmed elsewhere."""
    data = report(page)
    (name,) = data["clips"]
    group = data["clips"][name][0]
    at = next(i for i in range(len(group["frames"])) if i != group["anchor"])
    codec = tab.page.locator(".codec")
    codec.locator(".frame-at").fill(str(at))
    frame = group["frames"][at]
    caption = f"frame {frame['t']} · {len(frame['blocks']) // 3} blocks"
    expect(codec.locator(".frame-name")).to_contain_text(caption)
    width, height, values = codec.locator("canvas.frame").evaluate(
        "(c) => [c.width, c.height,"
        " [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    )
    drawn = np.array(values).reshape(height, width, 4)
    sample = encoded(corpus)["codec"]
    alpha = drawn[..., 3]
    own = {tuple(p) for p in sample.patch_positions[sample.patch_positions[:, 0] == frame["t"], 1:]}
    for row in range(height // 14):
        for column in range(width // 14):
            patch = alpha[14 * row + 3 : 14 * row + 11, 14 * column + 3 : 14 * column + 11]
            assert (patch == 255).all() == ((row, column) in own)
            assert (patch > 0).all()
    for place, patch in zip(sample.patch_positions, sample.patches, strict=True):
        if place[0] == frame["t"]:
            y, x = place[1] * 14, place[2] * 14
            want = patch.reshape(3, 14, 14).transpose(1, 2, 0)[2:12, 2:12]
            assert np.abs(drawn[y + 2 : y + 12, x + 2 : x + 12, :3] - want).mean() < 6
    codec.locator(".frame-next").click()
    expect(codec.locator(".frame-at")).to_have_value(str(at + 1))
    assert tab.errors == []
