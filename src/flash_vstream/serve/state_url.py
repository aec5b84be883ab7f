"""A state folder that is kept behind a URL of fsspec, such as ``s3://bucket/state``.

A server works on a copy of it on its own disk, since databases need one. What changes there is uploaded whenever
memories are saved, so that another server, on any machine, can go on from it.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec

from flash_vstream.errors import UserError
from flash_vstream.serve.store import StoreError
from flash_vstream.video.addresses import hide_secrets, hide_secrets_in_text
from flash_vstream.video.shared_memory import OwnedFolder

LEASE_SECONDS = 60.0
"""A server that has not renewed its lease for this long is dead, and another may take the state over."""
RENEW_SECONDS = 10.0
SETTLE_SECONDS = 0.5
"""How long a server waits before it reads its new lease again, in case another wrote one at the same moment."""
PARTS = ("*.sqlite", "memories/*.safetensors", "memories/*.set-aside*")
"""The files of a state folder that are kept."""
LEASE = "server.json"

log = logging.getLogger("flash_vstream.serve")

Version = tuple[int, ...]


def is_url(state: str) -> bool:
    """Whether a state is named by a URL, and not by a folder."""
    return "://" in state


class StateUrl:
    """The state behind ``url``, as a folder of this machine until ``close``.

    Only one server at a time may use it: it writes a lease there, which it renews. Raises ``UserError`` if there is a
    valid one of another server, or if the URL cannot be read and written.
    """

    def __init__(self, url: str):
        self.shown = hide_secrets(url)
        self._own = OwnedFolder("flash-vstream-state")
        self.folder = Path(self._own.path)
        self._id, self._renewed = secrets.token_hex(8), 0.0
        self._uploading = threading.Lock()
        self._known: dict[str, Version] = {}
        try:
            self._files, root = fsspec.url_to_fs(url)
            self._root = str(root).rstrip("/")
            self._take_lease()
            self._download()
        except BaseException as error:
            if self._renewed:
                with contextlib.suppress(Exception):
                    self._files.rm_file(self._at(LEASE))
            self._own.cleanup()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            raise UserError(
                f"--state {self.shown} cannot be used ({_reason(error)}); name a folder, or a URL that can be read and"
                " written"
            ) from None

    def upload(self) -> None:
        """Upload what has changed, and remove what is gone; raises ``StoreError``. Threads take turns."""
        with self._uploading:
            try:
                self._upload()
            except StoreError:
                raise
            except Exception as error:  # of any kind: every file system has its own
                raise StoreError(f"{self.shown}: {_reason(error)}") from None

    def _upload(self) -> None:
        self._check_lease()
        versions = {name: _version(self.folder / name) for name in self._names()}
        for name, version in versions.items():
            if self._known.get(name) != version:
                self._put(name)
                self._known[name] = version
            self._keep_lease()
        for name in self._known.keys() - versions.keys():
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._at(name))
            del self._known[name]
        self._renew()

    def close(self) -> None:
        """Upload what has changed, give the lease up and remove the copy; if that fails, keep it and log where."""
        try:
            self.upload()
            self._files.rm_file(self._at(LEASE))
        except Exception as error:
            kept = tempfile.mkdtemp(prefix="flash-vstream-kept-")
            shutil.copytree(self.folder, kept, dirs_exist_ok=True)
            log.error("the state could not be uploaded", extra={"reason": str(error), "kept": kept})
        self._own.cleanup()

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _names(self) -> list[str]:
        found = [path for pattern in PARTS for path in self.folder.glob(pattern)]
        return [path.relative_to(self.folder).as_posix() for path in found if not path.name.startswith(".")]

    def _download(self) -> None:
        (self.folder / "memories").mkdir()
        for place in (self._root, self._at("memories")):
            for found in self._listed(place):
                name = os.path.relpath(found, self._root)
                if any(Path(name).match(pattern) for pattern in PARTS) and ".." not in Path(name).parts:
                    self._files.get_file(found, str(self.folder / name))
                    self._known[name] = _version(self.folder / name)
                self._keep_lease()

    def _listed(self, place: str) -> list[str]:
        try:
            return [str(entry["name"]) for entry in self._files.ls(place, detail=True) if entry["type"] == "file"]
        except FileNotFoundError:
            return []

    def _put(self, name: str) -> None:
        """Upload a file so that it appears whole or not at all."""
        path = self.folder / name
        copy = self.folder / "uploading"
        if path.suffix == ".sqlite":  # whose newest rows may be in a second file
            with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as to:
                source.backup(to)
            path = copy
        try:
            self._write(name, path.open("rb"))
        finally:
            copy.unlink(missing_ok=True)

    def _write(self, name: str, data: Any) -> None:
        place = self._at(name)
        self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
        with data, self._files.transaction, self._files.open(place, "wb") as out:
            shutil.copyfileobj(data, out, 1 << 20)

    # --- the lease

    def _lease(self) -> dict[str, Any] | None:
        self._files.invalidate_cache()
        try:
            lease = json.loads(self._files.cat_file(self._at(LEASE)))
        except (FileNotFoundError, ValueError):  # there is none, or it is damaged
            return None
        return lease if isinstance(lease, dict) else None

    def _take_lease(self) -> None:
        """Write the lease, unless another server has a valid one; of two that write at once, the later has it."""
        self._check_free()
        self._renew()
        time.sleep(SETTLE_SECONDS)
        lease = self._lease()
        if lease is None or lease.get("id") != self._id:
            self._renewed = 0.0  # the lease there is not this server's to remove
            raise UserError(f"--state {self.shown} was taken by another server just now; stop one of them")

    def _check_free(self) -> None:
        lease = self._lease()
        if lease is not None and (age := time.time() - lease.get("time", 0.0)) < LEASE_SECONDS:
            raise UserError(
                f"--state {self.shown} is used by another server (process {lease.get('pid')} on {lease.get('host')},"
                f" {max(0.0, age):.0f} s ago); stop that one, or wait {LEASE_SECONDS:.0f} s if it has died"
            )

    def _check_lease(self) -> None:
        lease = self._lease()
        if lease is not None and lease.get("id") != self._id:
            holder = f"process {lease.get('pid')} on {lease.get('host')}"
            raise StoreError(f"{self.shown} is used by another server now ({holder}); stop one of them")

    def _keep_lease(self) -> None:
        """Renew the lease if that is due, during what may take long."""
        if time.monotonic() - self._renewed > RENEW_SECONDS:
            self._renew()

    def _renew(self) -> None:
        lease = {"id": self._id, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        place = self.folder / LEASE
        place.write_text(json.dumps(lease))
        self._write(LEASE, place.open("rb"))
        self._renewed = time.monotonic()


def _version(path: Path) -> Version:
    """What changes when a file does; a database's newest rows may be in a second file."""
    found = []
    for own in (path, path.with_name(f"{path.name}-wal")):
        with contextlib.suppress(FileNotFoundError):
            status = own.stat()
            found += [status.st_mtime_ns, status.st_size]
    return tuple(found)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return hide_secrets_in_text(text)[:300]
