"""``serve``: the HTTP server from the command line."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import ssl
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flash_vstream.cli.options import (
    Attn,
    Bits,
    Describe,
    Device,
    Dtype,
    LanguageEngine,
    Memory,
    Model,
    Pair,
    Record,
    describe_seconds,
    record_bytes,
)
from flash_vstream.cli.terminal import clean_end_on_signals
from flash_vstream.descriptors import allow_open_files
from flash_vstream.errors import UserError
from flash_vstream.imports import no_garbage
from flash_vstream.models.choice import ModelChoice

if TYPE_CHECKING:
    from flash_vstream.live.engine import StartEngine
    from flash_vstream.serve.security import AccessRules
    from flash_vstream.serve.service import NamedSource, Service


def serve(
    stream: Annotated[
        list[str] | None, typer.Option("--stream", help="NAME=SOURCE to watch from the start (repeatable).")
    ] = None,
    model: Model = "nano",
    host: Annotated[str, typer.Option("--host", help="Beyond loopback FLASH_VSTREAM_TOKEN must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    fps: Annotated[
        float | None, typer.Option("--fps", help="Frames a second of stream time to look at.  \\[default: as saved, 1]")
    ] = None,
    state: Annotated[
        str | None,
        typer.Option("--state", help="Folder, or URL such as s3://BUCKET/NAME, to keep memories and answers in."),
    ] = None,
    describe: Describe = None,
    record: Record = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate chain (PEM); serves HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="The certificate's private key (PEM).")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="Web origin whose pages may call.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Private host that sources may name.")] = None,
    allow_folder: Annotated[list[Path] | None, typer.Option(help="Folder whose files sources may name.")] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log each request as a line of JSON on stderr.")
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="local (two processes), or ray (workers on a Ray cluster).")
    ] = "local",
    frame_workers: Annotated[
        int, typer.Option(min=1, help="With ray: number of workers the streams are shared among.")
    ] = 1,
    question_workers: Annotated[int, typer.Option(min=1, help="With ray: answer with at most so many.")] = 1,
    spare_workers: Annotated[int, typer.Option(min=0, help="With ray: number of standby frame workers.")] = 1,
    worker_gpus: Annotated[float, typer.Option(min=0, help="With ray: GPUs for each worker, such as 0.25.")] = 0.0,
    worker_cpus: Annotated[float, typer.Option(min=0, help="With ray: cores for each worker.")] = 1.0,
    memory: Memory = "star",
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    bits: Bits = None,
    pair: Pair = None,
    language_engine: LanguageEngine = None,
) -> None:
    """Serve the HTTP API and the web page."""
    choice = ModelChoice(model, device, dtype, attn, bits, memory, pair=pair, language_engine=language_engine)
    seconds, most_bytes = describe_seconds(describe), record_bytes(record)
    if most_bytes is not None and state is None:
        raise UserError("--record needs --state FOLDER: the frames are kept there")
    check_certificate(tls_cert, tls_key)
    allow_open_files()  # before any process starts, since processes inherit the limit
    if engine == "local":
        from flash_vstream.live.fork_server import ensure_fork_server

        ensure_fork_server(choice)  # before this process imports as much itself
    access = access_rules(
        host, os.environ.get("FLASH_VSTREAM_TOKEN"), allow_origin or [], allow_host or [], allow_folder or []
    )
    placed = Placed(frame_workers, question_workers, spare_workers, worker_gpus, worker_cpus)
    start_engine = engine_of(engine, state, placed)
    from flash_vstream.json_log import log_to_stderr

    named = command_line_streams(stream or [], fps)
    listener = listen(host, port)
    log_to_stderr(log_requests)

    with no_garbage():  # while the fork server imports, too
        import uvicorn  # noqa: F401 - for run_server, later

        import flash_vstream.serve.app  # noqa: F401 - likewise
        from flash_vstream.models.kept import kept_folder
        from flash_vstream.serve.connections import connection_limit
        from flash_vstream.serve.service import Limits, Service

    with listener, clean_end_on_signals():
        with Console(stderr=True).status(f"loading {model}") as status:
            if kept_folder(choice) is None:
                from flash_vstream.models.hub import fetch_model, silence_transformers

                silence_transformers()
                fetch_model(model, status.update)
            each = Limits()  # of a worker
            limits = replace(
                each,
                streams=each.streams * frame_workers,
                questions_at_once=each.questions_at_once * question_workers,
            )
            service = Service(choice, access, state, limits, named, start_engine, seconds, most_bytes)
        try:
            shown = f"[{host}]" if ":" in host else host
            scheme = "https" if tls_cert else "http"
            print(json.dumps({"listening": f"{scheme}://{shown}:{listener.getsockname()[1]}/"}), flush=True)
            Console(stderr=True).print("Serving the page and the API; press Ctrl-C to stop.", style="dim")
            run_server(service, listener, connection_limit(), tls_cert, tls_key)
        finally:
            service.close()


def run_server(
    service: "Service", listener: socket.socket, most_connections: int, tls_cert: Path | None, tls_key: Path | None
) -> None:
    """Serve HTTP (HTTPS with a certificate) on ``listener`` until a signal stops it."""
    import uvicorn

    from flash_vstream.serve.app import make_app
    from flash_vstream.serve.connections import PatientProtocol

    app = make_app(service)
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        log_config=None,  # its loggers use our handler
        access_log=False,
        limit_concurrency=most_connections,
        timeout_graceful_shutdown=5,
        ws_max_size=2 * service.limits.frame_bytes,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    server = uvicorn.Server(config)
    app.state.ending = lambda: server.should_exit  # tells endless responses to stop
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    server.run(sockets=[listener])


@dataclass(frozen=True)
class Placed:
    """What ``--engine ray`` places on the cluster, and the GPUs and cores that each worker takes there."""

    frame_workers: int = 1
    question_workers: int = 1
    spare_workers: int = 1
    gpus: float = 0.0
    cpus: float = 1.0


def engine_of(engine: str, state: str | None, placed: Placed) -> "StartEngine":
    """What starts the engine of that name; raises ``UserError`` for one that there is not, or that lacks something."""
    if engine == "local":
        if placed != Placed():
            raise UserError(
                "--frame-workers, --question-workers, --spare-workers, --worker-gpus and --worker-cpus need"
                " --engine ray"
            )
        from flash_vstream.live.engine import local_engine

        return local_engine
    if engine != "ray":
        raise UserError(f"there is no engine called {engine!r}; choose from local, ray")
    if state is None:
        raise UserError(
            "--engine ray needs --state FOLDER: a stream whose machine dies goes on from what is saved there"
        )
    from flash_vstream.live.ray_engine import RayChoice, ray_engine

    place = state if "://" in state else str(Path(state).resolve())
    name = f"flash-vstream-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
    return ray_engine(RayChoice(name, **asdict(placed)))


def check_certificate(cert: Path | None, key: Path | None) -> None:
    """Raise ``UserError`` unless ``cert`` and ``key`` belong together, or neither is given."""
    if (cert is None) != (key is None):
        raise UserError("--tls-cert and --tls-key go together; give both or neither")
    if cert is None or key is None:
        return
    for option, path in (("--tls-cert", cert), ("--tls-key", key)):
        if not path.is_file():
            raise UserError(f"{option} {path} is not a file")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise UserError(f"--tls-cert {cert} and --tls-key {key} cannot be used ({error})") from None


def listen(host: str, port: int) -> socket.socket:
    """The socket to listen on, opened before anything slow starts."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen()  # callers may connect as soon as the address is printed
            on_error.pop_all()
        return listener
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from None


def access_rules(
    host: str, token: str | None, origins: Iterable[str], hosts: Iterable[str], folders: Iterable[Path]
) -> "AccessRules":
    """``AccessRules`` from the command line's options; raises ``UserError`` for a folder that does not exist."""
    folders = tuple(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--allow-folder {folder} is not a folder")
    from flash_vstream.serve.security import AccessRules

    return AccessRules(host, token, frozenset(origins), frozenset(name.lower() for name in hosts), folders)


def command_line_streams(texts: Iterable[str], fps: float | None) -> "dict[str, NamedSource]":
    """Parse each ``--stream NAME=SOURCE``; raises ``UserError`` if one is malformed or cannot be watched."""
    from flash_vstream.serve.schemas import NAME
    from flash_vstream.serve.service import NamedSource
    from flash_vstream.video.sources import Source

    named: dict[str, NamedSource] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or not name or not source:
            raise UserError(f"--stream {text!r} must be NAME=SOURCE, such as door=rtsp://camera.local/1")
        Source(source, 1.0 if fps is None else fps).checked()
        if not re.fullmatch(NAME, name):
            raise UserError(f"{name!r} cannot name a stream; use letters, digits, '.', '_' and '-'")
        if name in named:
            raise UserError(f"two --stream options name {name!r}; give each stream a name of its own")
        named[name] = NamedSource(source, fps)
    return named
