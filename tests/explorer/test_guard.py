"""Who is let in: names of the host, the origin of a run, sizes, and the token."""

from __future__ import annotations

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from trilens.explorer.guard import MAX_BODY_BYTES, Guard, Rules

HOME = "http://127.0.0.1:8765"
JSON = {"content-type": "application/json"}
LOCAL = Rules(port=8765)
OPEN = Rules(frozenset({"box"}), "s3cret", 8765)


def client(rules: Rules = LOCAL, **options) -> TestClient:
    app = Guard(PlainTextResponse("in"), rules)
    return TestClient(app, base_url=HOME, follow_redirects=False, **options)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8765", "localhost:8765", "localhost", "[::1]:8765", "LOCALHOST:9000"]
)
def test_names_of_this_machine(host: str) -> None:
    assert client().get("/", headers={"host": host}).text == "in"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "",
     "192.168.1.5:8765", "x@localhost", "localhost/x", "localhost:99999999", "localhost#", "[::1",
     "127.0.0.1:8765, evil.example", "0.0.0.0"],
)  # fmt: skip
def test_a_name_that_a_foreign_server_gave_is_refused(host: str) -> None:
    answer = client().get("/", headers={"host": host})
    assert answer.status_code == 421 and answer.json()["error"] == "RequestError"


def test_two_hosts_are_refused() -> None:
    answer = client().get("/", headers=[("host", "localhost"), ("host", "localhost")])
    assert answer.status_code == 421


@pytest.mark.parametrize(
    "origin",
    [None, "null", "http://evil.example", "http://127.0.0.1:8766", "http://localhost:8765"],
)
def test_a_run_is_started_from_its_own_page_alone(origin: str | None) -> None:
    headers = JSON | ({} if origin is None else {"origin": origin})
    assert client().post("/run", content="{}", headers=headers).status_code == 403
    assert client().post("/run", content="{}", headers=JSON | {"origin": HOME}).text == "in"


def test_a_form_of_another_site_is_no_json() -> None:
    headers = {"origin": HOME, "content-type": "text/plain"}
    assert client().post("/run", content="{}", headers=headers).status_code == 415


def test_a_body_that_is_too_large_is_not_read() -> None:
    headers = JSON | {"origin": HOME}
    assert client().post("/run", content="x" * MAX_BODY_BYTES, headers=headers).text == "in"
    answer = client().post("/run", content="x" * (MAX_BODY_BYTES + 1), headers=headers)
    assert answer.status_code == 413 and f"{MAX_BODY_BYTES:,}" in answer.json()["message"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(method: str) -> None:
    assert client().request(method, "/", headers={"origin": HOME}).status_code == 405


def test_every_answer_is_closed_to_other_sites() -> None:
    for answer in (client().get("/"), client().get("/", headers={"host": "evil.example"})):
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_token_moves_from_the_url_to_a_cookie() -> None:
    asking = client(OPEN)
    assert asking.get("/").status_code == 401
    assert asking.get("/?access=wrong").status_code == 401
    assert asking.get("/?access=s3cre").status_code == 401
    assert "set-cookie" not in asking.get("/?access=wrong").headers
    found = asking.get("/?prompt=a%26b&access=s3cret&token=3")
    assert found.status_code == 303 and found.headers["location"] == "/?prompt=a%26b&token=3"
    cookie = found.headers["set-cookie"].lower()
    assert "trilens-8765=s3cret" in cookie
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert asking.get("/").text == "in"  # the client keeps the cookie
    run = asking.post("/run", content="{}", headers=JSON | {"origin": HOME})
    assert run.text == "in"


def test_the_token_is_asked_for_whatever_the_path() -> None:
    asking = client(OPEN)
    for path in ("/", "/run", "//evil.example", "/x?access=s3cret"):
        answer = asking.get(path)
        assert answer.status_code in (401, 303)
        assert answer.headers.get("location", "/").startswith("/")
        assert not answer.headers.get("location", "/").startswith("//")
        asking.cookies.clear()
    headers = JSON | {"origin": HOME}
    assert asking.post("/run?access=s3cret", content="{}", headers=headers).status_code == 401
    assert asking.get("/", headers={"cookie": "trilens-8765=x"}).status_code == 401
    assert asking.get("/", headers={"cookie": "trilens-8765=s3cret"}).text == "in"


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("box:8765", True),
        ("192.168.1.5:8765", True),
        ("[fe80::1]:8765", True),
        ("evil.example", False),
    ],
)
def test_where_others_can_reach_it_numbers_are_names_too(host: str, known: bool) -> None:
    assert OPEN.knows(host) == known
    headers = {"host": host, "cookie": "trilens-8765=s3cret"}
    assert (client(OPEN).get("/", headers=headers).text == "in") == known
