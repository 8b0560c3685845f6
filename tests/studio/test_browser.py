"""The chat page of `loramix serve` in headless Chromium: `make browser`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from loramix.store import Store
from loramix.store.records import Turn

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1280, 800), (390, 844)
ASKED = "my card was stolen, what do I do?"
HOSTILE = """<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>
[here](javascript:window.harmed=1) ![seen](http://198.51.100.7/seen.png) **bold**"""
UNNAMED = """
const named = (e) => e.innerText?.trim() || e.getAttribute("aria-label") || e.labels?.length;
const all = document.querySelectorAll("button, input, textarea, [role=slider], a");
return [...all].filter((e) => e.offsetParent && !named(e)).map((e) => e.outerHTML);
"""
FOREIGN = """
const all = performance.getEntriesByType("resource").map((entry) => entry.name);
return all.filter((name) => !name.startsWith(location.origin) && !name.startsWith("data:"));
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('browser') / 'chat.db'}"


@pytest.fixture(scope="module")
def url(database):
    command = [sys.executable, "-m", "loramix", "serve", "--port", "0"]
    environment = os.environ | {"LORAMIX_DATABASE": database}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        yield process.stdout.readline().split()[-1]
        process.terminate()
        assert process.wait(timeout=30) == 0


@pytest.fixture
def page(url):
    page = Page(url)
    yield page
    errors = [entry["message"] for entry in page.driver.get_log("browser")]
    page.driver.quit()
    assert [error for error in errors if "favicon" not in error] == []


class Page:
    """A browser of its own on the chat page."""

    def __init__(self, url):
        from selenium import webdriver

        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        if chromium is None:
            pytest.skip("no chromium (apt-get install chromium chromium-driver)")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.url = url
        self.resize(DESKTOP)
        self.open()

    def resize(self, size):
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def open(self, path="/"):
        self.driver.get(self.url + path)
        self.until(lambda: self.all("textarea, #key"))

    def reload(self):
        self.driver.refresh()
        self.until(lambda: self.all("textarea"))

    def all(self, css):
        return [e for e in self.driver.find_elements("css selector", css) if e.is_displayed()]

    def one(self, css):
        self.until(lambda: self.all(css))
        return self.all(css)[0]

    def texts(self, css):
        return [element.text for element in self.all(css)]

    def type(self, *keys):
        self.one("textarea").send_keys(*keys)

    def ask(self, text):
        from selenium.webdriver.common.keys import Keys

        num_before = len(self.all(".facts"))
        self.type(text, Keys.ENTER)
        self.until(lambda: len(self.all(".facts")) > num_before)

    def run(self, script):
        return self.driver.execute_script(script)

    def until(self, true, seconds=30):
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while True:
            try:
                if true():
                    return
            except WebDriverException:
                pass  # it is being drawn anew
            assert time.monotonic() < end, self.texts("body")
            time.sleep(0.05)


def test_a_chat_is_kept_with_its_mixes_and_their_reasons(page):
    page.ask(ASKED)
    assert page.texts(".answer .mix") == ["banking"]
    assert page.texts(".answer .text") == ["lost_or_stolen_card"]
    page.one("summary").click()
    assert "stolen" in page.one(".foot ul").text
    page.reload()
    page.until(lambda: page.texts(".question") == [ASKED])
    assert page.texts(".answer .mix") == ["banking"]
    assert page.run(UNNAMED) == []
    assert page.run(FOREIGN) == []


def test_faders_move_by_keys_and_a_second_mix_answers_beside_the_first(page):
    from selenium.webdriver.common.keys import Keys

    page.ask(ASKED)
    page.one('[aria-label="Weight of sql"]').send_keys(*[Keys.ARROW_RIGHT] * 6)
    page.until(lambda: page.texts(".again") == ["refresh\nAgain with banking+sql:0.3"])
    assert page.one('[role="switch"]').get_attribute("aria-checked") == "false"
    page.one(".again").click()
    page.until(lambda: len(page.all(".facts")) == 2)
    left, right = page.all(".answer")
    assert left.rect["y"] == right.rect["y"]
    assert left.rect["x"] < right.rect["x"]
    page.reload()
    page.until(lambda: page.texts(".answer .mix") == ["banking", "banking+sql:0.3"])
    assert page.texts(".pill") == ["tune\nMix: banking+sql:0.3"]


def test_a_mix_that_cannot_be_is_told_in_words(page):
    from selenium.webdriver.common.keys import Keys

    name = page.one('[aria-label="The mix by name"]')
    name.send_keys(Keys.CONTROL, "a")
    name.send_keys("sqll:0.4", Keys.ENTER)
    page.until(lambda: "sqll" in page.one(".mix-name").text)
    assert "sql" in page.one(".mix-name").text


def test_escape_stops_and_what_there_is_is_kept(page):
    from selenium.webdriver.common.keys import Keys

    name = page.one('[aria-label="The mix by name"]')
    name.send_keys(Keys.CONTROL, "a")
    name.send_keys("sql:-1", Keys.ENTER)  # it does not come to an end by itself
    page.until(lambda: page.texts(".pill") == ["tune\nMix: sql:-1"])
    page.type("tell me a very long story about a fox", Keys.ENTER)
    page.until(lambda: len(page.one(".answer .text").text) > 20)
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until(lambda: page.texts(".facts") == ["chosen · stopped"])
    text = page.one(".answer .text").text
    page.reload()
    page.until(lambda: page.all(".facts"))
    assert page.one(".answer .text").text.startswith(text[:20])
    assert page.one(".facts").text.endswith("stopped")


def test_a_question_that_was_not_sent_outlives_a_reload(page):
    from selenium.webdriver.common.keys import Keys

    page.type("my card", Keys.SHIFT, Keys.ENTER, Keys.NULL, "is lost")
    page.reload()
    page.until(lambda: page.one("textarea").get_property("value") == "my card\nis lost")
    page.type(Keys.ENTER)
    page.until(lambda: page.all(".facts"))
    assert page.texts(".question") == ["my card\nis lost"]
    page.reload()
    page.until(lambda: page.all(".facts"))
    assert page.one("textarea").get_property("value") == ""


def test_what_a_model_writes_can_do_nothing(page, database):
    with Store.open(database) as store:
        made = store.conversations.create("", title="<img src=x onerror='window.harmed=1'>")
        turns = [Turn("user", HOSTILE, 0), Turn("assistant", HOSTILE, 1, mix="base")]
        store.conversations.append(made.id, turns)
    page.open(f"/?chat={made.id}")
    page.until(lambda: page.all(".answer strong"))
    assert "<script>" in page.one(".answer .text").text
    assert "<img" in page.one(".question").text
    assert page.run("return document.querySelectorAll('.thread img, .thread script').length") == 0
    for link in page.all(".answer a"):
        assert link.get_attribute("href").startswith("http")
    assert page.run("return window.harmed") is None


def test_conversations_are_renamed_and_deleted(page):
    page.ask(ASKED)
    num_before = len(page.all(".entry"))
    page.one(".entry.current .more").click()
    page.until(lambda: page.all(".q-menu .q-item"))
    page.all(".q-menu .q-item")[0].click()
    title = page.one(".dialog input")
    page.until(lambda: title.get_attribute("value") == ASKED)
    title.send_keys(" (done)")
    page.all(".dialog button")[-1].click()
    page.until(lambda: page.one(".entry.current .entry-title").text == f"{ASKED} (done)")
    page.until(lambda: not page.all(".dialog"))
    page.one(".entry.current .more").click()
    page.until(lambda: page.all(".q-menu .q-item"))
    page.all(".q-menu .q-item")[1].click()
    page.until(lambda: page.all(".dialog"))
    page.all(".dialog button")[-1].click()
    page.until(lambda: len(page.all(".entry")) == num_before - 1)
    assert page.all(".welcome")


def test_a_phone_has_it_all(page):
    page.ask(ASKED)
    page.one(".again").click()
    page.until(lambda: len(page.all(".facts")) == 2)
    page.resize(PHONE)
    page.reload()
    page.until(lambda: len(page.all(".facts")) == 2)
    above, below = page.all(".answer")
    assert above.rect["x"] == below.rect["x"]
    assert page.run("return document.documentElement.scrollWidth") <= PHONE[0]
    assert not page.all(".fader")
    page.one(".pill").click()
    page.until(lambda: len(page.all(".fader")) == 5)
    page.run("document.querySelector('.q-drawer__backdrop:not(.hidden)').click()")
    page.until(lambda: not page.all(".fader"))
    page.one('[aria-label="Conversations"]').click()
    page.until(lambda: page.all(".new"))
    time.sleep(0.4)  # it slides in
    page.one(".new").click()
    page.until(lambda: page.all(".welcome") and not page.all(".new"))


def test_escape_closes_what_lies_over_the_page(page):
    from selenium.webdriver.common.keys import Keys

    page.resize(PHONE)
    page.reload()
    page.one(".pill").click()
    page.until(lambda: page.all(".range"))
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until(lambda: not page.all(".q-drawer__backdrop:not(.hidden)"))


def test_dark_is_kept(page):
    theme = page.one(".side-foot button")
    while "dark" not in theme.text:
        before = theme.text
        theme.click()
        page.until(lambda before=before: theme.text != before)
    page.until(lambda: "body--dark" in page.one("body").get_attribute("class"))
    page.reload()
    page.until(lambda: "body--dark" in page.one("body").get_attribute("class"))


def test_a_key_is_asked_for_and_is_what_counts(page, database):
    from selenium.webdriver.common.keys import Keys

    with Store.open(database) as store:
        secret = store.keys.add("ada", adapters=["sql"])[1]
        try:
            page.open()
            page.one("#key").send_keys(secret, Keys.ENTER)
            page.until(lambda: page.texts(".fader-name") == ["sql"])
            assert page.all(".entry") == []
            page.ask(ASKED)
            assert page.texts(".answer .mix") == ["base"]
            page.all(".side-foot button")[-1].click()
            page.until(lambda: page.all("#key"))
        finally:
            store.keys.remove("ada")
