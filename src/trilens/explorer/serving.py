"""A server on a port of this machine."""

from __future__ import annotations

import errno
import logging
import secrets
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from trilens.errors import PortInUseError, ServeError
from trilens.explorer.guard import ACCESS, Rules
from trilens.io.messages import clip

__all__ = ["LOOPBACK", "Bound", "bind", "serve"]

LOOPBACK = "127.0.0.1"
_CONNECTIONS = 64
_HEADER_BYTES = 65_536


class Bound:
    """A port that is taken, and who may come to it.

    Attributes:
        socket: that listens.
        rules: who may ask.
        address: where a browser finds it, with the token where there is one.
    """

    def __init__(self, listening: socket.socket, host: str | None) -> None:
        self.socket = listening
        port = listening.getsockname()[1]
        token = None if host is None else secrets.token_urlsafe(32)
        names = frozenset({host.lower(), socket.gethostname().lower()} if host else ())
        self.rules = Rules(names, token, port)
        name = LOOPBACK if host is None else host
        # Every address of this machine is not one that a browser can open.
        shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(name, name)
        shown = f"[{shown}]" if ":" in shown else shown
        query = "" if token is None else f"?{ACCESS}={token}"
        self.address = f"http://{shown}:{port}/{query}"


def bind(host: str | None, port: int) -> Bound:
    """Take a port.

    Args:
        host: an address or name of this machine; None for the loopback alone.
        port: 0 for one that is free.

    Raises:
        PortInUseError: another program has it.
        ServeError: no such address here, or a port that this user may not take.
    """
    name = LOOPBACK if host is None else host
    try:
        if not name:  # would be every address of this machine
            raise OSError("it is empty")
        family, kind, protocol, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ServeError(f"host {clip(name)} is no address of this machine: {error}") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_CONNECTIONS)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"port {port} of {name} is in use: give another with --port, or --port 0 for one "
                "that is free"
            ) from error
        raise ServeError(
            f"port {port} of {clip(name)} cannot be taken: {error.strerror}"
        ) from error
    return Bound(listening, host)


def serve(app: ASGIApp, bound: Bound, started: Callable[[], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        app: what answers.
        bound: the port.
        started: called once it is open to connections.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    started()
    # A page that is closed while it is answered is no news to whoever reads the terminal.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    uvicorn.Server(config).run(sockets=[bound.socket])
