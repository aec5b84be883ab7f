"""``serve``: the HTTP server from the command line."""

import json
import logging
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flash_vstream.errors import UserError
from flash_vstream.forking import keep_ready
from flash_vstream.serve.access import access_rules
from flash_vstream.serve.gate import JsonLines
from flash_vstream.serve.schemas import NAME


def serve(
    host: str,
    port: int,
    model: str,
    streams: Sequence[str],
    fps: float,
    state: Path | None,
    origins: Sequence[str],
    hosts: Sequence[str],
    folders: Sequence[Path],
    log_requests: bool,
) -> None:
    """Run until Ctrl-C; raises ``UserError`` for options that do not fit together."""
    access = access_rules(host, os.environ.get("FLASH_VSTREAM_TOKEN"), origins, hosts, folders)
    keep_ready()
    from flash_vstream.serve.service import Service, command_line_stream

    named = [command_line_stream(text, fps) for text in streams]
    for name, _ in named:
        if not re.fullmatch(NAME, name):
            raise UserError(f"{name!r} cannot name a stream; use letters, digits, '.', '_' and '-'")
    listener = listen(host, port)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("flash_vstream")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if log_requests else logging.WARNING)

    import uvicorn

    from flash_vstream.models.zoo import prepared, quiet
    from flash_vstream.serve.app import make_app

    quiet()
    with Console(stderr=True).status(f"loading {model}") as status:
        prepared(model, status.update)
        service = Service(model, access, state)
    try:
        for name, source in named:
            if name not in service.live.names():  # it may have come back with the state folder
                service.add_stream(name, source)
        shown = f"[{host}]" if ":" in host else host
        print(json.dumps({"listening": f"http://{shown}:{listener.getsockname()[1]}/"}), flush=True)
        Console(stderr=True).print("The page and the API are there; Ctrl-C ends.", style="dim")
        config = uvicorn.Config(
            make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=5, ws_max_size=2**24
        )
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        service.close()


def listen(host: str, port: int) -> socket.socket:
    """The socket to listen on, taken before anything slow is begun."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # whoever reads the address may connect at once
        return listener
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from None
