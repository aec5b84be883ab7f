"""The fork server: a process that has already imported what workers need and forks them, so each starts in a second."""

import multiprocessing
import multiprocessing.util
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.kept import kept_folder
from flash_vstream.video.shared_memory import OwnedFolder

PRELOADED = ["flash_vstream.live.preload"]
WITH_TRANSFORMERS = "flash_vstream.models.hub"
"""Preloaded for models that need it."""
FOLDER_KIND = ".fvs-fork"
"""Short, since the path of a socket may have only about a hundred characters (``LONGEST_FOLDER`` and what follows)."""
LONGEST_FOLDER = 68
_starting = threading.Lock()
"""Two workers may be restarted at once."""
_addresses: set[str] = set()
_sockets: Path | None = None
"""Where this process's fork servers have their sockets."""
_remove_sockets: Callable[[], object] | None = None


def ensure_fork_server(model: ModelChoice) -> ForkServerContext:
    """Start the fork server unless it is running, and return the context for starting workers with ``model``.

    Call it early: the fork server then imports in parallel with the caller.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *([WITH_TRANSFORMERS] if kept_folder(model) is None else [])])
    with _starting:
        _own_socket_folder()
        resource_tracker.ensure_running()  # first, because starting it unblocks Ctrl-C
        _note_address()  # starting a process may have started a fork server, too
        # The fork server inherits the mask: Ctrl-C belongs to its parent and must not abort the imports with a
        # traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        current = _note_address()
        for address in set(_addresses) - {current}:  # those of fork servers that died
            Path(address).unlink(missing_ok=True)
            _addresses.discard(address)
    return context


def end_fork_server() -> None:
    """End the fork server and remove its sockets, in a process that will be killed instead of exiting by itself."""
    running: Any = forkserver._forkserver
    with _starting:
        with suppress(OSError):  # it waits for its child, which Ray may have waited for
            running._stop()
        if _remove_sockets is not None:
            _remove_sockets()


def _note_address() -> str | None:
    """Remember the address of the running fork server, and return it.

    Only those are removed: a manager of multiprocessing in the same program has its socket in the same folder.
    """
    address: str | None = getattr(forkserver._forkserver, "_forkserver_address", None)
    if address:
        _addresses.add(address)
    return address


def _own_socket_folder() -> None:
    """Let multiprocessing keep fork servers' sockets in an owned folder: its own would outlive a ``kill -9``."""
    global _sockets, _remove_sockets
    longest = LONGEST_FOLDER - len(f"/{FOLDER_KIND}-12345678")
    if _sockets is None and len(tempfile.gettempdir()) <= longest:
        folder = OwnedFolder(FOLDER_KIND)
        before, tempfile.tempdir = tempfile.tempdir, folder.path
        try:
            _sockets = Path(multiprocessing.util.get_temp_dir())  # made once, where temporary files are just then
        finally:
            tempfile.tempdir = before
        # multiprocessing removes its own folder at a priority of -100; after that this one goes.
        _remove_sockets = multiprocessing.util.Finalize(None, folder.detach(), exitpriority=-200)
