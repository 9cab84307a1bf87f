"""The workbench: ``consilience serve``. A light process answers the browser; networks run
in worker processes beside it.
"""

from __future__ import annotations

import argparse
import ipaddress
import secrets
import socket
import sys
from contextlib import suppress
from pathlib import Path

from consilience.types import DEFAULT_MODEL, ConsilienceError


def serve(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C; ``arguments`` are those of the command line.

    Raises `ConsilienceError` where something that was named is not there, or where the
    extra ``web`` is not installed.
    """
    try:
        import uvicorn
        from fastapi import FastAPI as _  # noqa: F401
    except ImportError:
        raise ConsilienceError(
            "the workbench needs fastapi and uvicorn; install them with: "
            "pip install 'consilience[web]'"
        ) from None
    from consilience.runs.folder import RECORDS, run_kind

    for folder in arguments.runs:
        if run_kind(folder) is None:
            raise ConsilienceError(
                f"{folder} is no run: it has none of {', '.join(RECORDS)}"
            )
    if arguments.images is not None and not Path(arguments.images).is_dir():
        raise ConsilienceError(f"{arguments.images} is no folder of images")
    for plugin in arguments.plugins or ():
        if not Path(plugin).is_file():
            raise ConsilienceError(f"plugin {plugin!r} is not a file")
    bound = _bound(arguments.host, arguments.port)
    port = bound.getsockname()[1]
    loopback = _is_loopback(arguments.host)
    token = arguments.token or (None if loopback else secrets.token_urlsafe(16))

    from consilience.web.app import Options, create_app
    from consilience.web.desk import Setting
    from consilience.web.guard import LOOPBACK

    setting = Setting(
        tuple(dict.fromkeys(arguments.model or [DEFAULT_MODEL])),
        tuple(str(Path(one).resolve()) for one in arguments.plugins or ()),
        None if arguments.images is None else str(Path(arguments.images).resolve()),
        arguments.labels,
        arguments.device,
    )
    # behind a token any name may lead here; without one only the machine's own
    hosts = LOOPBACK if token is None else ("*",)
    runs = tuple(str(Path(one).resolve()) for one in arguments.runs)
    app = create_app(Options(setting, runs, token, hosts))
    name = arguments.host if not loopback else "localhost"
    shown = f"[{name}]" if ":" in name else name
    query = "" if token is None else f"?token={token}"
    print(f"workbench: http://{shown}:{port}/{query}", flush=True)
    print("Ctrl-C ends it; images that were given to it go with it", file=sys.stderr)
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, timeout_graceful_shutdown=2
    )
    with suppress(KeyboardInterrupt):  # which uvicorn raises anew when all is closed
        uvicorn.Server(config).run(sockets=[bound])
    return 0


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket; `ConsilienceError` where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind((host, port))
        one.listen(2048)  # from now on who connects waits instead of being refused
    except (OSError, OverflowError) as error:
        one.close()
        reason = getattr(error, "strerror", None) or error
        raise ConsilienceError(
            f"cannot listen on {host} port {port}: {reason}; --port 0 takes any that is free"
        ) from None
    return one
