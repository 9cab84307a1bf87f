"""What stands before the workbench, without its workers: who may ask, how often, how
much.
"""

import asyncio

import pytest

pytest.importorskip("fastapi")

from consilience.types import ConsilienceError
from consilience.web import guard, shelter
from consilience.web.guard import Guard
from consilience.web.shelter import Shelter


async def plain(scope, receive, send):
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(
    app, method="GET", path="/", headers=(), body=(b"",), client="1.2.3.4", query=b""
):
    """(status, headers, content) of one request."""
    sent = []
    parts = list(body)

    async def receive():
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    named = {"host": "localhost:1", **dict(headers)}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query,
        "headers": [(k.encode(), v.encode()) for k, v in named.items()],
        "client": (client, 5),
    }
    asyncio.run(app(scope, receive, send))
    told = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], told, b"".join(one.get("body", b"") for one in sent[1:])


@pytest.fixture
def open_to_us():
    return Guard(plain, guard.LOOPBACK, None)


def test_every_answer_has_the_headers(open_to_us):
    for status, headers, _ in (
        ask(open_to_us),
        ask(open_to_us, headers={"host": "evil.example"}),
    ):
        assert status in (200, 421)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe-eval" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8765", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("[::1]", 200),
        ("evil.example:8765", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
def test_only_its_own_names(open_to_us, host, status):
    assert ask(open_to_us, headers={"host": host})[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"x-consilience": "1"}, 200),
        ({"x-consilience": "1", "origin": "http://localhost:1"}, 200),
        ({"x-consilience": "1", "origin": "http://localhost:2"}, 403),
        ({"x-consilience": "1", "origin": "https://evil.example"}, 403),
        ({"x-consilience": "1", "origin": "null"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_change_comes_from_its_own_pages_or_a_script(
    open_to_us, headers, status, method
):
    assert ask(open_to_us, method, headers=headers)[0] == status


def test_what_is_too_large_is_refused_by_its_word_and_by_its_weight(open_to_us):
    mark = {"x-consilience": "1"}
    said = {**mark, "content-length": str(10**9)}
    assert ask(open_to_us, "POST", headers=said)[0] == 413
    many = [b"x" * 1_000_000] * 22
    assert ask(open_to_us, "POST", headers=mark, body=many)[0] == 413
    assert ask(open_to_us, "POST", headers=mark, body=many[:3])[2] == b"3000000"
    assert ask(open_to_us, "POST", headers={**mark, "content-length": "-1"})[0] == 413


def test_a_token_is_asked_for_and_is_remembered():
    app = Guard(plain, ("*",), "secret")
    assert ask(app)[0] == 401
    assert ask(app, query=b"token=wrong")[0] == 401
    assert (
        ask(app, path="/api/x", query=b"token=secret")[0] == 401
    )  # by the door alone
    status, headers, _ = ask(app, query=b"token=secret")
    assert status == 303
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    kept = cookie.partition(";")[0]
    assert ask(app, headers={"cookie": kept})[0] == 200
    assert ask(app, headers={"cookie": kept + "x"})[0] == 401
    assert ask(app, headers={"cookie": "\x00;;=;consilience"})[0] == 401
    assert ask(app, headers={"authorization": "Bearer secret"})[0] == 200
    assert ask(app, headers={"authorization": "Bearer secrets"})[0] == 401


def test_a_client_that_asks_too_often_waits(open_to_us, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    got = [ask(open_to_us)[0] for _ in range(int(guard.BURST) + 3)]
    assert got == [200] * int(guard.BURST) + [429] * 3
    status, headers, _ = ask(open_to_us)
    assert status == 429
    assert headers["retry-after"] == "1"
    assert ask(open_to_us, client="5.6.7.8")[0] == 200
    now[0] += 0.5  # ten more by then
    assert [ask(open_to_us)[0] for _ in range(11)] == [200] * 10 + [429]
    now[0] += 1e6  # never more than the burst, however long it was quiet
    got = [ask(open_to_us)[0] for _ in range(int(guard.BURST) + 1)]
    assert got == [200] * int(guard.BURST) + [429]


def test_clients_are_forgotten_before_they_are_too_many(open_to_us, monkeypatch):
    monkeypatch.setattr(guard, "CLIENTS", 10)
    for number in range(50):
        ask(open_to_us, client=str(number))
    assert len(open_to_us._clients) == 10


# ---- the shelter


PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 100


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4",
        b"PK\x03\x04",
        b"RIFF1234WAVE",
    ],
)
def test_only_images_by_their_content(tmp_path, content):
    with pytest.raises(ConsilienceError, match="no image that the workbench reads"):
        Shelter(tmp_path).put("a.png", content)
    assert not list((tmp_path / "uploads").iterdir())


def test_names_lead_nowhere_and_uploads_are_private(tmp_path):
    held = Shelter(tmp_path / "held") if (tmp_path / "held").mkdir() is None else None
    one = held.put("../../etc/pass\x07wd.png", PNG)
    assert one.name == "pass\ufffdwd"
    assert one.path.parent == tmp_path / "held" / "uploads"
    assert one.path.suffix == ".png"
    assert (tmp_path / "held").stat().st_mode & 0o077 == 0
    assert held.get(one.number) is one
    for number in ("", "..", "../uploads", one.path.name):
        with pytest.raises(ConsilienceError, match="not here"):
            held.get(number)


def test_uploads_expire_an_hour_after_they_were_used(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(shelter.time, "time", lambda: now[0])
    held = Shelter(tmp_path)
    old, used = held.put("old.png", PNG), held.put("used.png", PNG)
    old.used = used.used = now[0]
    now[0] += 3000
    held.get(used.number)
    now[0] += 700
    assert held.get(used.number) is used
    assert used.path.is_file()
    assert not old.path.exists()
    with pytest.raises(ConsilienceError, match="not any more"):
        held.get(old.number)


def test_the_shelter_has_room_for_so_much(tmp_path, monkeypatch):
    monkeypatch.setattr(shelter, "ROOM", 250)
    held = Shelter(tmp_path)
    held.put("a.png", PNG)
    held.put("b.png", PNG)
    with pytest.raises(shelter.TooMuchError):
        held.put("c.png", PNG)
    held.reserve("e", "").size = 100
    with pytest.raises(shelter.TooMuchError):
        held.reserve("f", "")
    monkeypatch.setattr(shelter, "UPLOAD", 50)
    with pytest.raises(ConsilienceError, match="MB"):
        held.put("d.png", PNG)


def test_names_are_told_apart():
    assert shelter.apart(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
