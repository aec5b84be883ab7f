"""``serve``: the HTTP server from the command line."""

import json
import logging
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flash_vstream.cli.options import Fps, Model
from flash_vstream.errors import UserError

if TYPE_CHECKING:
    from flash_vstream.serve.security import AccessRules
    from flash_vstream.video.sources import Source


def serve(
    stream: Annotated[
        list[str] | None, typer.Option("--stream", help="NAME=SOURCE to watch from the start (several allowed).")
    ] = None,
    model: Model = "nano",
    host: Annotated[str, typer.Option("--host", help="Beyond loopback FLASH_VSTREAM_TOKEN must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    fps: Fps = 1.0,
    state: Annotated[Path | None, typer.Option("--state", help="Folder to keep memories and answers in.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="Web origin whose pages may call.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Private host that sources may name.")] = None,
    allow_folder: Annotated[list[Path] | None, typer.Option(help="Folder whose files sources may name.")] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line of JSON on stderr for each.")] = False,
) -> None:
    """Serve the HTTP API and the web page."""
    from flash_vstream.live.fork_server import ensure_fork_server

    access = access_rules(
        host, os.environ.get("FLASH_VSTREAM_TOKEN"), allow_origin or [], allow_host or [], allow_folder or []
    )
    ensure_fork_server()
    from flash_vstream.serve.logging import JsonFormatter
    from flash_vstream.serve.schemas import NAME
    from flash_vstream.serve.service import Service

    named = [command_line_stream(text, fps) for text in stream or []]
    for name, _ in named:
        if not re.fullmatch(NAME, name):
            raise UserError(f"{name!r} cannot name a stream; use letters, digits, '.', '_' and '-'")
    listener = listen(host, port)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("flash_vstream")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if log_requests else logging.WARNING)

    import uvicorn

    from flash_vstream.models.hub import fetch_model, silence_transformers
    from flash_vstream.serve.app import make_app

    silence_transformers()
    with Console(stderr=True).status(f"loading {model}") as status:
        fetch_model(model, status.update)
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


def access_rules(
    host: str, token: str | None, origins: Iterable[str], hosts: Iterable[str], folders: Iterable[Path]
) -> "AccessRules":
    """``AccessRules`` from the command line's options; raises ``UserError`` for a folder that is not there."""
    folders = tuple(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--allow-folder {folder} is not a folder")
    from flash_vstream.serve.security import AccessRules

    return AccessRules(host, token, frozenset(origins), frozenset(name.lower() for name in hosts), folders)


def command_line_stream(text: str, fps: float) -> "tuple[str, Source]":
    """``NAME=SOURCE`` of ``serve --stream``; raises ``UserError`` when it is not that."""
    name, equals, source = text.partition("=")
    if not equals or not name or not source:
        raise UserError(f"--stream {text!r} must be NAME=SOURCE, such as door=rtsp://camera.local/1")
    from flash_vstream.video.sources import Source

    return name, Source(source, fps)
