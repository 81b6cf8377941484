"""Who may ask: Host and Origin of a request, its size, and a token where others reach it too."""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trilens.printable import one_line

__all__ = ["ACCESS", "MAX_BODY_BYTES", "Guard", "Rules", "refusal"]

ACCESS = "access"
"""Name of the token in a URL; it moves to a cookie and out of the URL at once."""

MAX_BODY_BYTES = 100_000
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class Rules:
    """What a server lets in.

    Attributes:
        names: what the Host of a request may be, besides names of this machine alone and, where
            others can reach it, an address in numbers, which no foreign name server gives.
        token: that a request must hold; None where only this machine can reach the server.
        port: of the server; a cookie is for a host, whatever its port.
    """

    names: frozenset[str] = frozenset()
    token: str | None = None
    port: int = 0

    @property
    def cookie(self) -> str:
        """Name of the cookie that holds the token."""
        return f"trilens-{self.port}"

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server; its port may be that of a tunnel."""
        try:
            parts = urlsplit(f"//{host}")
            name = parts.hostname or ""
            _ = parts.port
        except ValueError:
            return False
        if parts.path or parts.query or parts.username is not None or "#" in host:
            return False
        if name in _LOOPBACK or name in self.names:
            return True
        return self.token is not None and _is_address(name)

    def admits(self, given: str | None) -> bool:
        """Whether a token is the right one, in a time that does not tell how much of it is."""
        if self.token is None:
            return True
        return hmac.compare_digest((given or "").encode(), self.token.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def refusal(status: int, name: str, message: str) -> Response:
    """An answer that says what was wrong, with the name of the error."""
    body = json.dumps({"error": name, "message": one_line(message)})
    return Response(f"{body}\n", status, media_type="application/json")


class Guard:
    """Refuses what another site, another machine or a broken client sends."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app = app
        self.rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault(
                    "content-security-policy", "default-src 'none'; frame-ancestors 'none'"
                )
            await send(message)

        answer = self._refused(scope) or self._entered(scope)
        await (answer or self.app)(scope, receive, sent)

    def _refused(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.rules.knows(hosts[0]):
            return refusal(
                421, "RequestError", f"host {', '.join(hosts) or '(none)'} is not this server"
            )
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return refusal(405, "RequestError", f"method {scope['method']}: send GET or POST")
        return _refused_post(headers, hosts[0])

    def _entered(self, scope: Scope) -> Response | None:
        """Ask for the token; one in the URL becomes a cookie."""
        if self.rules.token is None or self.rules.admits(_cookie(scope, self.rules.cookie)):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == ACCESS]
        if scope["method"] != "GET" or not given or not self.rules.admits(given[-1]):
            return refusal(
                401, "RequestError", "the token is missing or wrong: open the address that was "
                "printed when the server started",
            )  # fmt: skip
        rest = urlencode([(name, value) for name, value in query if name != ACCESS])
        # Within this server, whatever the path says.
        answer = RedirectResponse(f"/?{rest}" if rest else "/", 303)
        answer.set_cookie(self.rules.cookie, given[-1], httponly=True, samesite="strict", path="/")
        return answer


def _refused_post(headers: Headers, host: str) -> Response | None:
    """A run is started by a page of ours alone, and its body is short JSON."""
    origins = headers.getlist("origin")
    if len(origins) != 1 or origins[0] not in (f"http://{host}", f"https://{host}"):
        given = ", ".join(origins) or "(none)"
        return refusal(
            403,
            "RequestError",
            f"origin {given} is not this server: a run is started from its own page",
        )
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return refusal(415, "RequestError", "the body is no JSON: send application/json")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        return refusal(
            413, "RequestError", f"the body has {length} bytes: at most {MAX_BODY_BYTES:,}"
        )
    return None


def _cookie(scope: Scope, name: str) -> str | None:
    try:
        found: Mapping[str, object] = SimpleCookie(Headers(scope=scope).get("cookie", ""))
    except CookieError:
        return None
    morsel = found.get(name)
    return None if morsel is None else str(getattr(morsel, "value", ""))
