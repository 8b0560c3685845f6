"""Who gets to see the page, and that the API beside it stays as it is."""

from __future__ import annotations

import re

import httpx
import pytest
from nicegui import ui
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from loramix.errors import ServeError
from loramix.studio.fader import Fader
from loramix.studio.site import COOKIE, with_page
from tests.shop import BANKING
from tests.studio.conftest import Site
from tests.studio.test_page import ask, found, labels, opened, until

SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport="


@pytest.fixture
def add(site: Site):
    def add(name, **said):
        return site.front.service.kept.keys.add(name, **said)[1]

    return add


def test_the_page_is_whole_without_the_internet(site: Site):
    page = site.front.http.get("/")
    assert page.status_code == 200
    assert not re.findall(r"(?:src|href|url)\W{1,3}https?://", page.text)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in re.findall(r'"(/_nicegui/[^"$]+\.(?:js|css))"', page.text):
        assert site.front.http.get(path).status_code == 200


def test_other_paths_are_the_api_s(site: Site):
    assert site.front.http.get("/v1/nowhere").json()["error"]["message"].startswith("There is no")
    assert site.front.http.get("/v1/chat/completions").status_code == 405
    assert site.front.http.get("/chat").status_code == 404


def test_a_process_has_one_page(site: Site):
    with pytest.raises(ServeError, match="has a chat page already"):
        with_page(site.app)


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}],
)
@pytest.mark.parametrize("path", ["/", SOCKET + "polling"])
def test_without_keys_no_other_site_gets_a_page_or_a_socket(site: Site, path, headers):
    response = site.front.http.get(path, headers=headers)
    assert response.status_code == 403
    assert "This was asked for a page of" in response.json()["error"]["message"]


def test_a_web_socket_is_refused_to_other_sites(site: Site):
    address = site.front.url.replace("http", "ws") + SOCKET + "websocket"
    with pytest.raises(InvalidStatus, match="403"):
        connect(address, origin="http://evil.example")
    with connect(address, origin=site.front.url) as socket:
        assert str(socket.recv(timeout=10)).startswith("0{")


def test_without_keys_other_machines_are_not_let_in(site: Site):
    async def away():
        transport = httpx.ASGITransport(site.app, client=("203.0.113.9", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return [(await http.get(path)).status_code for path in ("/", SOCKET + "polling")]

    assert site.act(away()) == [401, 401]


def test_with_keys_the_page_asks_for_one(site: Site, add):
    secret = add("ada", adapters=["sql"])
    with httpx.Client(base_url=site.front.url) as http:
        page = http.get("/")
        assert "This server asks for a key" in page.text
        wrong = http.post("/sign-in", data={"key": "lmx-wrong"})
        assert (wrong.status_code, COOKIE in http.cookies) == (401, False)
        assert "That key is not known" in wrong.text
        stolen = http.post("/sign-in", data={"key": secret}, headers={"origin": "http://evil"})
        assert stolen.status_code == 403
        right = http.post("/sign-in", data={"key": secret})
        assert right.status_code == 303
        assert "HttpOnly" in right.headers["set-cookie"]
        assert "SameSite=strict" in right.headers["set-cookie"]
        assert "This server asks for a key" not in http.get("/").text
        assert http.get("/v1/models").status_code == 401  # the cookie opens the page, not the API
        http.post("/sign-out")
        assert "This server asks for a key" in http.get("/").text


def test_a_page_has_the_rights_of_its_key(site: Site, add):
    secret, other = add("ada", adapters=["sql"]), add("bob")

    async def story():
        user = await opened(site, cookie=f"{COOKIE}={secret}")
        await ask(user, BANKING)
        return [fader.props["aria-label"] for fader in found(user, Fader, "")], labels(user, "mix")

    faders, mixes = site.act(story())
    assert faders == ["Weight of sql"]
    assert mixes == ["base"]  # the router's choice is not this key's
    with httpx.Client(base_url=site.front.url) as http:
        for key, num in ((secret, 1), (other, 0)):
            listed = http.get("/v1/conversations", headers={"authorization": f"Bearer {key}"})
            assert len(listed.json()["data"]) == num


def test_a_page_has_the_limits_of_its_key(site: Site, add):
    secret = add("eve", requests_per_minute=3)

    async def story():
        user = await opened(site, cookie=f"{COOKIE}={secret}")  # takes two
        found(user, ui.textarea, "")[0].value = BANKING
        user.find("arrow_upward").click()  # one makes the conversation, one is too much
        await until(lambda: any(labels(user, "notice")))
        return [text for text in labels(user, "notice") if text]

    (notice,) = site.act(story())
    assert notice.startswith("This key's 3 requests in a minute are used up")


@pytest.mark.parametrize("key", ["\u043a\u043b\u044e\u0447", "a\nb", "lmx-\0"])
def test_what_could_be_no_key_is_not_known(site: Site, key):
    got = site.front.http.post("/sign-in", data={"key": key})
    assert got.status_code == 303  # there are no keys yet, so any will do
    site.front.service.kept.keys.add("ada")
    got = site.front.http.post("/sign-in", data={"key": key})
    assert (got.status_code, "That key is not known" in got.text) == (401, True)


def test_a_page_that_is_refused_says_why(site: Site, add):
    secret = add("eve", requests_per_minute=1)
    with httpx.Client(base_url=site.front.url, cookies={COOKIE: secret}) as http:
        page = http.get("/")
    assert page.status_code == 429
    assert "1 requests in a minute are used up" in page.text


def test_a_key_that_was_removed_ends_its_pages(site: Site, add):
    secret = add("ada")
    add("bob")

    async def story():
        user = await opened(site, cookie=f"{COOKIE}={secret}")
        site.front.service.kept.keys.remove("ada")
        found(user, ui.textarea, "")[0].value = BANKING
        user.find("arrow_upward").click()
        await until(lambda: any(labels(user, "notice")))
        return [text for text in labels(user, "notice") if text]

    (notice,) = site.act(story())
    assert notice.startswith("The API key is not known")
