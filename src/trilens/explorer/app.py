"""The explorer's answers: its page, and a stream of what a run does."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from trilens.errors import BusyError, RequestError, TrilensError
from trilens.explorer.exploring import Explored, Explorer
from trilens.explorer.guard import MAX_BODY_BYTES, Guard, Rules, refusal
from trilens.explorer.page import explorer_page, facts_of, knockouts
from trilens.explorer.runs import Event, Run, Runs
from trilens.explorer.saved import Saved
from trilens.explorer.state import State

__all__ = ["model_app", "saved_app"]

_KEPT = 8  # results, of a few MB each
_BODY_SECONDS = 10


def saved_app(saved: Saved, rules: Rules) -> Guard:
    """Serve a page that is there already."""

    async def home(_: Request) -> Response:
        return HTMLResponse(saved.html, headers={"content-security-policy": saved.policy})

    return Guard(Starlette(routes=[Route("/", home)]), rules)


def model_app(explorer: Explorer, rules: Rules, *, seconds: float) -> Guard:
    """Serve a model.

    Args:
        explorer: the model.
        rules: who may ask.
        seconds: that a run may take.
    """
    served = _Served(explorer, rules, Runs(seconds=seconds))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        served.runs.close()

    routes = [Route("/", served.home), Route("/run", served.run, methods=["POST"])]
    return Guard(Starlette(routes=routes, lifespan=lifespan), rules)


class _Served:
    """A model with its runs and their results."""

    def __init__(self, explorer: Explorer, rules: Rules, runs: Runs) -> None:
        self.explorer = explorer
        self.rules = rules
        self.runs = runs
        self.offered = knockouts(explorer.lens)
        self.facts = facts_of(explorer.lens)
        self.found: OrderedDict[State, Explored] = OrderedDict()

    async def home(self, request: Request) -> Response:
        """The page of the state that the URL names; nothing is run here."""
        problem, state = "", State()
        try:
            state = State.from_query(parse_qsl(request.url.query, keep_blank_values=True))
        except TrilensError as error:
            problem = f"{type(error).__name__}: {error}"
        found = explorer_page(
            self.explorer.name,
            state,
            self.offered,
            self.found.get(state.run),
            facts=self.facts,
            auto=self._is_own(request),
            problem=problem,
        )
        headers = {"content-security-policy": f"{found.policy}; frame-ancestors 'none'"}
        return HTMLResponse(found.html, 400 if problem else 200, headers=headers)

    def _is_own(self, request: Request) -> bool:
        """Whether a person, or a page of ours, led here: a link of another site runs nothing."""
        site = request.headers.get("sec-fetch-site")
        if site is None:  # browsers leave it out where the connection is not trusted
            return self.rules.token is not None
        return site in ("none", "same-origin")

    async def run(self, request: Request) -> Response:
        """Run a state: a line of JSON for each event; who goes away cancels."""
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await _body(request)
            state = State.from_json(json.loads(body)).run
            state.read_edits()
        except TimeoutError:
            return refusal(408, "RequestError", f"no whole request came in {_BODY_SECONDS} s")
        except (ValueError, RecursionError) as error:
            if isinstance(error, TrilensError):
                return refusal(400, type(error).__name__, str(error))
            return refusal(400, "RequestError", f"the body is no JSON: {error}")
        except TrilensError as error:
            status = 413 if isinstance(error, RequestError) else 400
            return refusal(status, type(error).__name__, str(error))

        def work(run: Run) -> Event:
            found = self.explorer.explore(
                state, run.step, lambda name, text: run.tell({"text": name, "piece": text})
            )
            run.check()
            self.found[state] = found
            self.found.move_to_end(state)
            while len(self.found) > _KEPT:
                self.found.popitem(last=False)
            return {"query": state.query}

        try:
            return _Stream(self.runs, self.runs.start(work))
        except BusyError as error:
            return refusal(503, type(error).__name__, str(error))


async def _body(request: Request) -> bytes:
    """All of it; a length that was not told is counted.

    Raises:
        RequestError: it is too large.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise RequestError(f"the body is too large: at most {MAX_BODY_BYTES:,} bytes")
            parts.append(part)
    except ClientDisconnect:
        raise RequestError("the client went away before its request was whole") from None
    return b"".join(parts)


class _Stream(Response):
    """The events of a run as they come; it is cancelled when the client goes away."""

    media_type = "application/x-ndjson"

    def __init__(self, runs: Runs, run: Run) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._runs = runs
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        gone = asyncio.create_task(_until_gone(receive))
        telling = asyncio.create_task(self._tell(send))
        try:
            await asyncio.wait({gone, telling}, return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                telling.result()
        except OSError:
            pass  # the client went away while it was told
        finally:
            self._runs.cancel(self._run)
            gone.cancel()
            telling.cancel()

    async def _tell(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while (event := await self._run.events.get()) is not None:
            line = f"{json.dumps(event)}\n".encode()
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
