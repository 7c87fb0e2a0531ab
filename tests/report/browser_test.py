"""The page in a real browser: every control, accessibility, hostile texts, and a large run."""

import contextlib
import dataclasses
import shutil

import pytest

from espl_jax.report.page import render
from espl_jax.report.read import read_run
from tests.support.made_runs import HOSTILE, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}

pytestmark = [
    pytest.mark.slow(minutes=4),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


def encode(text):
    return [ord(character) for character in text]


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The files of a page about one run with hostile texts, and of a page about four modes."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = write_run(folder / "hostile", iterations=6, members=9, hostile=True, encode=encode, tokens=30)
    four = [
        write_run(folder / mode, mode=mode, iterations=5, members=5, encode=encode)
        for mode in ("espl", "rl", "evolution", "reflection")
    ]
    return {
        "one": _page(folder / "one.html", [hostile]),
        "four": _page(folder / "four.html", four),
    }


def _page(file, workdirs):
    runs = [dataclasses.replace(read_run(each), decode=chr) for each in workdirs]
    file.write_text(render(runs), encoding="utf-8")
    return file


@contextlib.contextmanager
def opened(chromium, file, screen="desktop"):
    """Opens a page; fails if it logs an error, asks for a file, or runs a hostile text."""
    context = chromium.new_context(**SCREENS[screen], offline=True, reduced_motion="reduce")
    page = context.new_page()
    faults = []
    page.on("console", lambda each: faults.append(each.text) if each.type in ("error", "warning") else None)
    page.on("pageerror", lambda each: faults.append(str(each)))
    page.on("dialog", lambda each: (faults.append(f"dialog {each.message}"), each.dismiss()))
    page.on("request", lambda each: faults.append(each.url) if each.url.startswith("http") else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page
    page.wait_for_timeout(200)
    assert faults == []
    context.close()


def drawn(page, chart):
    """Scrolls to a chart and waits until it is drawn."""
    page.locator(f"#{chart}").scroll_into_view_if_needed()
    page.wait_for_selector(f"#{chart}.js-plotly-plot .main-svg")


def _thread_seconds(page):
    """CPU seconds of the page's thread so far: what it takes on an idle machine, whatever this one does."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(each["value"] for each in metrics if each["name"] == "ThreadTime")


def scroll_through(page):
    height = page.evaluate("document.documentElement.scrollHeight")
    for y in range(0, height, 500):
        page.evaluate(f"scrollTo(0, {y})")
        page.wait_for_timeout(60)
    page.wait_for_timeout(300)


def open_all(page):
    """Opens every `details`, also those inside others."""
    for _ in range(3):
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        page.wait_for_timeout(400)


def test_every_control(chromium, pages):
    with opened(chromium, pages["one"]) as page:
        for link in page.locator("nav a").all():
            link.click()
        page.click("button.copy >> nth=0")
        page.wait_for_selector("#status:has-text('Copied.')", state="attached")
        page.locator("#smoothing").fill("1")
        assert "mean over 3" in page.inner_text("#smoothing-value")
        drawn(page, "family-chart")
        page.locator("#family-chart .point").nth(1).click(force=True)
        page.wait_for_selector("#member-title:has-text('Member p1')")
        page.click("#member-next")
        page.wait_for_selector("#member-title:has-text('Member p2')")
        page.click("#member-previous")
        page.select_option("#member-select", "p3")
        page.wait_for_selector("#member-title:has-text('Member p3')")
        page.locator("#member button.link").first.click()
        page.wait_for_selector("#member-title:focus")
        drawn(page, "ratings-chart")
        page.fill("#ratings-count", "5")
        drawn(page, "scores-chart")
        page.select_option("#scores-select", "all")
        page.click("#scores-next")
        page.click("#scores-previous")
        assert page.input_value("#scores-select") == "all"
        page.click("#conversations-show")
        page.wait_for_selector("#conversations details")
        open_all(page)
        scroll_through(page)
        assert page.locator("figure .js-plotly-plot").count() == page.locator("figure .chart").count()


def test_rollouts_are_filtered_and_opened(chromium, pages):
    with opened(chromium, pages["one"]) as page:
        rows = page.locator("#rollouts-table tbody tr")
        page.select_option("#rollouts-select", "1")
        page.wait_for_selector("#rollouts-shown:has-text('iteration 1 had 24')")
        assert rows.count() == 24
        page.fill("#filter-low", "0.5")
        rewarded = rows.count()
        assert 0 < rewarded < 24
        page.select_option("#filter-problem", index=1)
        assert rows.count() < rewarded
        page.select_option("#filter-prompt", index=1)
        page.fill("#filter-high", "0.2")
        assert "No rollout passes" in page.inner_text("#rollouts-table")
        page.click("#filter-reset")
        assert rows.count() == 24
        page.click("#rollouts-next")
        page.click("#rollouts-previous")
        page.wait_for_selector("#rollouts-shown:has-text('iteration 1 had 24')")
        page.locator("#rollouts-table button:text('Open')").nth(1).click()
        page.wait_for_selector("#rollout:focus")
        ways = page.locator("#rollout select option").all_inner_texts()
        assert ways == ["logprob", "importance ratio", "advantage", "none"]
        for way, least in (("ratio", 5), ("advantage", 0), ("none", 0), ("logprob", 5)):
            page.select_option("#rollout select", way)
            coloured = page.locator("#rollout .tokens span[style*='background']").count()
            assert coloured >= least, way
        page.click("#rollout button:text('Close')")
        assert page.locator("#rollout").is_hidden()


def test_hostile_texts_are_shown_and_not_run(chromium, pages):
    with opened(chromium, pages["one"]) as page:
        page.select_option("#rollouts-select", "1")
        page.wait_for_selector("#rollouts-shown:has-text('iteration 1 had 24')")
        page.locator("#rollouts-table button:text('Open')").first.click()
        page.wait_for_selector("#rollout:focus")
        messages = page.locator("#rollout .tokens .message").all_inner_texts()
        assert [each.split("\n")[0] for each in messages] == ["model", "appended by the environment", "model"]
        assert all(text in messages[0] and text in messages[1] for text in HOSTILE)
        assert HOSTILE[0] in page.inner_text("#rollout .message.user"), "the problem"
        page.select_option("#member-select", "p1")
        page.wait_for_selector("#member-title:has-text('Member p1')")
        assert HOSTILE[1] in page.inner_text("#member .principles")
        page.click("#conversations-show")
        open_all(page)
        assert HOSTILE[1] in page.inner_text("#conversations")
        drawn(page, "family-chart")
        scroll_through(page)
        assert page.locator("img").count() == 0
        assert page.evaluate("document.querySelectorAll('script:not([type])').length") == 2  # and plotly


def test_runs_side_by_side(chromium, pages):
    with opened(chromium, pages["four"]) as page:
        assert page.locator("#curve-runs li").all_inner_texts() == ["espl", "rl", "evolution", "reflection"]
        for run in range(4):
            page.select_option("#run-select", str(run))
            scroll_through(page)
        page.select_option("#run-select", "1")
        assert page.locator("#family-chart").is_hidden()
        assert "did not reflect" in page.inner_text("#reflection-body")


def test_keyboard(chromium, pages):
    with opened(chromium, pages["one"]) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.locator("#member-next").focus()
        page.locator("#member-select").select_option("p0")
        page.keyboard.press("Enter")
        page.wait_for_selector("#member-title:has-text('Member p1')")
        page.locator("#rollouts-table button:text('Open')").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#rollout:focus")


def test_charts_follow_the_colour_scheme(chromium, pages):
    with opened(chromium, pages["one"]) as page:
        drawn(page, "family-chart")
        colour = "getComputedStyle(document.querySelector('#family-chart .xtick text')).fill"
        light = page.evaluate(colour)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(f"{colour} !== '{light}'")


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", ["one", "four"])
def test_accessibility(name, screen, chromium, pages):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    with opened(chromium, pages[name], screen) as page:
        page.click("#conversations-show")
        page.locator("#rollouts-table button:text('Open')").first.click()
        open_all(page)
        scroll_through(page)
        found = axe.Axe().run(page).response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert [(each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in serious] == []
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= SCREENS[screen]["viewport"]["width"], "the page scrolls sideways"


def test_a_large_run(chromium, tmp_path):
    run = write_run(
        tmp_path / "large", iterations=300, members=200, prompts=3, problems=10, samples=5, tokens=100
    )
    file = _page(tmp_path / "large.html", [run])
    assert file.stat().st_size < 15e6
    with opened(chromium, file) as page:
        page.click("#rollouts-previous")
        page.wait_for_selector("#rollouts-shown:has-text('iteration 299 had 150')")
        assert _thread_seconds(page) < 3
        drawn(page, "family-chart")
        page.select_option("#scores-select", "all")
        drawn(page, "scores-chart")
        scroll_through(page)
