"""The page of stage 08 in a real Chromium: search, add, remove, slide, reasons, map, hostile titles, a server that is gone."""
import json
import os
import re
import shutil
import signal

import pytest
from serving import N_ITEMS, TITLES, ask, ids, item_id, make_data, oracle, running

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the Python package playwright")
playwright.expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory)


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine; install one (Debian: apt install chromium) or name it in CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def port(data):
    with running(data) as (_, port):
        yield port


@pytest.fixture
def open_page(browser):
    """Function that opens the page; any script error, blocked resource or dialog fails the test in the end."""
    troubles, contexts = [], []

    def call(port, hash="", width=1280, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" and "Failed to load resource" not in message.text else None)
        page.goto(f"http://127.0.0.1:{port}/{hash}")
        return page
    yield call
    for context in contexts:
        context.close()
    assert not troubles


def ready(page):
    """Wait until the page shows the answer to its last question; item titles in rank order."""
    page.wait_for_selector("#answer[aria-busy=false]", state="attached")
    rows = page.locator(".items li").evaluate_all("rows => rows.map(r => [Number(r.querySelector('.rank').textContent), r.querySelector('.title').textContent])")
    return [title for _, title in sorted(rows)]


def names(numbers):
    return [("Pens & Paper" if n == 1 else TITLES[n] or item_id(n)) if n in TITLES else f"Thing number {n}" for n in numbers]


def counted(page, selector, count):
    """Wait until there are so many. (The page forbids eval, so a condition cannot be sent to it as a string.)"""
    playwright.expect(page.locator(selector)).to_have_count(count, timeout=60_000)


def history(page):
    return page.locator("#history li span").all_text_contents()


def test_search_add_remove_and_slide_with_the_keyboard_alone(data, port, open_page):
    page = open_page(port)
    popular = ready(page)
    assert len(popular) == 20 and page.locator("#fallback").is_visible() and page.locator("h2", has_text="Most popular").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("thing 40")
    page.wait_for_selector("#found[aria-busy=false]")
    page.wait_for_selector("#found li[aria-selected=true]")
    page.keyboard.press("Enter")
    counted(page, "#history li", 1)
    page.keyboard.type("thing num")
    page.wait_for_selector("#found[aria-busy=false]")
    counted(page, "#found li", 12)
    second = page.locator("#found li").nth(1).text_content()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    counted(page, "#history li", 2)
    assert history(page) == ["Thing number 40", second]
    number = int(second.split()[-1])
    assert ready(page) == names(oracle(data, [40, number], 20, {40, number})[0])
    assert not page.locator("#fallback").is_visible()

    page.locator("#k").focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    counted(page, ".items li", 15)
    assert page.locator("#k-value").text_content() == "15"
    before = ready(page)
    page.locator("#diversity").focus()
    page.keyboard.press("End")
    playwright.expect(page.locator("#diversity-value")).to_have_text("1")
    after = ready(page)
    wanted = json.loads(ask(port, json.dumps({"history": ids(40, number), "k": 15, "diversity": 1.0}).encode())[1])["items"]
    assert after == [i["title"] or i["id"] for i in wanted] != before

    page.locator("#history button").first.focus()
    page.keyboard.press("Enter")
    counted(page, "#history li", 1)
    assert history(page) == [second]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == f"Remove {second}"
    page.locator("#clear").click()
    page.wait_for_selector("#fallback:not([hidden])")
    assert history(page) == []
    assert re.search(r"items in \d+ ms", page.locator("#status").text_content())


def test_columns_show_labels_reasons_and_where_they_come_from(data, port, open_page):
    shown = (5, 40, 7, 22, 61)
    page = open_page(port, "#" + "&".join(f"item={i}" for i in ids(*shown)))
    ready(page)
    answer = json.loads(ask(port, json.dumps({"history": ids(*shown), "per_interest": 10}).encode())[1])
    winners = page.locator("#items .letter").all_text_contents()
    assert winners == ["ABC"[i["interest"]] for i in answer["items"]] and len(set(winners)) >= 2
    assert page.locator(".column").count() == page.locator("#chips button").count() == len(answer["interests"]) == 3
    listed, before = {i["id"]: i["rank"] for i in answer["items"]}, set()
    for n, interest in enumerate(answer["interests"]):
        column = page.locator(".column").nth(n)
        assert column.locator(".name").text_content() == "ABC"[n] + interest["label"]["text"]
        assert "not from this history" in column.locator("header .dim").text_content()
        assert column.locator(".because li").all_text_contents() == [i["title"] or i["id"] for i in interest["because_of"]]
        fresh = [i for i in interest["items"] if i["id"] not in before]  # what columns before it show is only counted
        assert column.locator(".title").all_text_contents() == [i["title"] or i["id"] for i in fresh]
        assert column.locator(".rank").all_text_contents() == [str(i["rank"]) for i in fresh]
        assert column.locator(".sub span:last-child").all_text_contents() == [
            f"no. {listed[i['id']]} above" if i["id"] in listed else f"{i['score']:.2f}" for i in fresh]
        counts = [int(n) for n in re.findall(r"(\d+) under", "".join(column.locator(".same").all_text_contents()))]
        assert sum(counts) == 10 - len(fresh)
        before |= {i["id"] for i in interest["items"]}
        assert page.locator("#chips button").nth(n).locator(".dim").text_content() == str(winners.count("ABC"[n]))
    page.locator("#chips button").nth(2).click()
    assert page.evaluate("document.activeElement.id") == "interest-2"
    assert page.locator("#stamp").is_visible() and "offline" in page.locator("#stamp").text_content()
    page.locator(".items button").first.click()
    counted(page, "#history li", 6)
    assert "item=" in page.url and page.url.count("item=") == 6  # the address brings this history back
    page.locator("#user").fill("U3")
    page.locator("#user").press("Enter")
    counted(page, "#history li", 12)
    assert page.locator("#history li.old").count() == 6 and "newest 6" in page.locator("#history-note").text_content()
    page.locator("#user").fill("nobody")
    page.locator("#user").press("Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert "nobody" in page.locator("#problem").text_content()


def test_enter_waits_for_what_the_present_words_find(port, open_page):
    page = open_page(port)
    ready(page)
    page.keyboard.press("/")
    page.keyboard.type("thing num")
    page.wait_for_selector("#found[aria-busy=false]")
    page.locator("#search").fill("thing 40")  # the list is still that of other words
    page.keyboard.press("Enter")
    counted(page, "#history li", 1)
    assert history(page) == ["Thing number 40"]


def test_titles_are_shown_as_text(port, open_page):
    page = open_page(port, "#" + "&".join(f"item={i}" for i in ids(3, 5)) + "&k=100")
    titles = ready(page)
    assert history(page) == [TITLES[3], TITLES[5]] and len(titles) == N_ITEMS - 2
    assert TITLES[4] in titles and "Pens & Paper" in titles and item_id(2) in titles  # no title: the id
    page.locator("#seen").uncheck()
    counted(page, ".items li", N_ITEMS)
    assert {TITLES[3], TITLES[5]} <= set(ready(page))
    page.locator("#search").fill("img src")
    page.wait_for_selector("#found li[aria-selected=true]")
    assert page.locator("#found li").first.text_content() == TITLES[3]
    assert page.locator("img, main script, b").count() == 0  # nothing of the data became markup


def test_the_map_draws_what_is_recommended(port, open_page):
    page = open_page(port, f"#item={item_id(40)}&item={item_id(11)}")
    ready(page)
    count = """() => { const c = document.getElementById('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();
                       for (let i = 0; i < d.length; i += 4) if (d[i + 3] === 255) seen.add([d[i], d[i + 1], d[i + 2]].join()); return [...seen]; }"""
    colours = page.evaluate(count)
    shown = page.locator(".column").evaluate_all("columns => columns.map(c => c.style.getPropertyValue('--mark'))")
    for colour in shown:
        assert ",".join(str(int(colour[i:i + 2], 16)) for i in (1, 3, 5)) in colours
    page.locator("#clear").click()
    page.wait_for_selector("#fallback:not([hidden])")
    assert len(page.evaluate(count)) > 2 and page.evaluate(count) != colours
    assert f"Map of {N_ITEMS} items" in page.locator("#canvas").get_attribute("aria-label")


@pytest.mark.parametrize("width, scheme", [(360, "dark"), (390, "light"), (820, "light"), (1400, "dark")])
def test_it_fits_the_screen_in_both_schemes(port, open_page, width, scheme):
    page = open_page(port, "#" + "&".join(f"item={i}" for i in ids(5, 40, 7, 22, 61)), width=width, color_scheme=scheme)
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = page.evaluate("""() => {
      const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
                           return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
      const back = node => { for (; node; node = node.parentElement) { const c = getComputedStyle(node).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; } };
      return [...document.querySelectorAll('h1, h2, .dim, .title, .sub span, .rank, .because li, .strip span, label, #stamp, .legend li, #status')]
        .filter(n => n.textContent.trim() && n.offsetParent)
        .map(n => { const a = light(getComputedStyle(n).color), b = light(back(n)); return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), n.className || n.id || n.tagName]; })
        .sort((a, b) => a[0] - b[0])[0]; }""")
    assert contrast[0] >= 4.5, contrast  # WCAG AA
    small = page.locator("button:visible").evaluate_all("buttons => buttons.map(b => Math.min(b.offsetWidth, b.offsetHeight)).sort((a, b) => a - b)[0]")
    assert small >= 24  # WCAG 2.5.8


def test_a_server_that_goes_away_is_reported_and_found_again(data, open_page):
    with running(data) as (process, port):
        page = open_page(port, f"#item={item_id(40)}")
        before = ready(page)
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.locator("#k").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#problem:not([hidden])")
        assert "does not answer" in page.locator("#problem").text_content()
        assert history(page) == ["Thing number 40"] and page.locator(".items li").count() == len(before)  # nothing is lost
    with running(data, port=port):
        page.wait_for_selector("#problem", state="hidden", timeout=60_000)
        assert len(ready(page)) == 21


def test_a_token_is_asked_for(data, open_page):
    with running(data, env={"EIMF_TOKEN": "s3cret"}) as (_, port):
        page = open_page(port)
        page.wait_for_selector("#token-form:not([hidden])")
        page.locator("#token").fill("wrong")
        page.locator("#token").press("Enter")
        page.wait_for_selector("#problem:not([hidden])")
        page.locator("#token").fill("s3cret")
        page.locator("#token").press("Enter")
        page.wait_for_selector("#token-form", state="hidden")
        assert len(ready(page)) == 20 and "s3cret" not in page.url
