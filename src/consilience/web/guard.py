"""What stands between a browser and the workbench: who may ask, how often, how much, and
what a page may do.
"""

from __future__ import annotations

import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from consilience.web.shelter import UPLOAD

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
MARK = "x-consilience"
"""A header that another site's page cannot send: every change must carry it."""
RATE, BURST = 20.0, 120.0
"""Requests a second that a client may keep up, and how many at once."""
CLIENTS = 4096
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """An ASGI application before another.

    ``hosts`` are the names it answers to (against rebinding of names), ``token`` is what
    a client must know where the server is open to others.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...], token: str | None) -> None:
        self.app, self.hosts, self.token = app, hosts, token
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        body = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal body
            message = await receive()
            body += len(message.get("body", b""))
            if body > UPLOAD + 1_000_000:
                raise _TooLargeError
            return message

        started = False

        async def sheltered(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                there = {name.lower() for name, _ in message["headers"]}
                added = {**HEADERS, "cache-control": "no-store"}
                added["content-security-policy"] = POLICY
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in added.items()
                        if name.encode() not in there
                    ),
                ]
            await send(message)

        try:
            await self.app(scope, limited, sheltered)
        except _TooLargeError:
            if not started:
                await _answer(send, 413, "this is larger than the workbench takes")

    def _refused(
        self, scope: Scope, headers: dict[str, str]
    ) -> tuple[int, str] | tuple[int, str, dict[str, str]] | None:
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name not in self.hosts and "*" not in self.hosts:
            return 421, f"this server does not go by the name {name[:80]!r}"
        if self.token is not None:
            query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
            given = query.get("token", [""])[0]
            if scope["path"] == "/" and _same(given, self.token):
                cookie = (
                    f"consilience={self.token}; HttpOnly; SameSite=Strict; Path=/"
                )
                return 303, "", {"location": "/", "set-cookie": cookie}
            if not self._knows(headers):
                return (
                    401,
                    "this workbench needs its token: open the address that it printed",
                )
        client = (scope.get("client") or ("?",))[0]
        wait = self._too_often(client)
        if wait is not None:
            return 429, "too many requests", {"retry-after": f"{wait:.0f}"}
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if MARK not in headers or (
                origin is not None and urlsplit(origin).netloc != host
            ):
                return (
                    403,
                    f"a request that changes something carries the header {MARK}",
                )
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > UPLOAD + 1_000_000:
                return 413, f"a request may have {UPLOAD / 1e6:.0f} MB"
        return None

    def _knows(self, headers: dict[str, str]) -> bool:
        assert self.token is not None
        cookie: SimpleCookie = SimpleCookie()
        try:
            cookie.load(headers.get("cookie", ""))
        except Exception:  # whatever somebody sends
            return False
        kept = cookie["consilience"].value if "consilience" in cookie else ""
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        return _same(kept, self.token) or _same(bearer, self.token)

    def _too_often(self, client: str) -> float | None:
        """Seconds to wait where a client has used up its requests (a token bucket)."""
        now = time.monotonic()
        left, then = self._clients.pop(client, (BURST, now))
        left = min(BURST, left + RATE * (now - then))
        allowed = left >= 1
        self._clients[client] = (left - 1 if allowed else left, now)
        while len(self._clients) > CLIENTS:
            self._clients.popitem(last=False)
        return None if allowed else max(1.0, (1 - left) / RATE)


class _TooLargeError(Exception):
    pass


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


async def _answer(
    send: Send, status: int, reason: str, more: dict[str, str] | None = None
) -> None:
    headers = {
        **HEADERS,
        "content-security-policy": POLICY,
        "content-type": "application/json",
        **(more or {}),
    }
    content = json.dumps({"error": reason}).encode() if reason else b""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (name.encode(), value.encode()) for name, value in headers.items()
            ],
        }
    )
    await send({"type": "http.response.body", "body": content})
