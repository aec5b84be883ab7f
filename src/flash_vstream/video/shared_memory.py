"""Files that processes share, in a folder that is preferably in RAM.

Deals with space and ownership, independent of the files' contents.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from flash_vstream.errors import UserError

FOLDER_VARIABLE = "FLASH_VSTREAM_SHARED_FOLDER"
"""Names a folder to use instead of /dev/shm, on disk if need be: containers often have only 64 MB of shared memory."""
_ZEROS = bytes(2**20)


def shared_folder() -> str:
    """The folder for shared files: ``FLASH_VSTREAM_SHARED_FOLDER`` if set, else /dev/shm, else the temporary folder.

    Raises ``UserError`` if the variable does not name a writable folder.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        if not (os.path.isdir(named) and os.access(named, os.W_OK | os.X_OK)):
            raise UserError(f"{FOLDER_VARIABLE} is {named!r}, which is not a folder that can be written; name another")
        return named
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()


def reserve(path: str, size: int) -> None:
    """Create a file of ``size`` zero bytes at ``path``, with all its space reserved.

    Raises ``UserError`` if there is too little space, and leaves no file behind.
    """
    try:
        with open(path, "wb") as file:
            take_space(file, size)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def take_space(file: IO[bytes], size: int) -> None:
    """Extend an empty file to ``size`` bytes, with all its space reserved.

    Without reserved space, writing to the mapped file kills the process (SIGBUS) once the file system is full.
    Raises ``UserError`` if there is too little space.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for at in range(0, size, len(_ZEROS)):
            file.write(_ZEROS[: size - at])
        file.flush()
    except OSError as error:
        raise UserError(_too_little(size, error.strerror or str(error))) from None


def check_space(folder: str, size: int) -> None:
    """Raise ``UserError`` unless ``folder`` has ``size`` bytes free."""
    space = os.statvfs(folder)
    if space.f_bavail * space.f_frsize < size:
        raise UserError(_too_little(size, f"{folder} is full"))


def _too_little(size: int, reason: str) -> str:
    return (
        f"there is no room for {size / 1e6:.1f} MB of shared memory ({reason}); watch fewer streams, give the machine"
        f" or container more (docker run --shm-size), or name a folder on disk in {FOLDER_VARIABLE}"
    )


class OwnedFolder:
    """A folder that is removed when its owner ends, or at the next start if the owner was killed.

    The owner holds a lock (flock) on the folder. The kernel releases it however the process ends, so an unlocked folder
    is abandoned. Unlike a process id, a lock also works between containers that share the parent folder. Creating one
    first removes the abandoned folders of the same ``kind``. Raises ``UserError`` if it cannot be locked.
    """

    def __init__(self, kind: str, within: str | None = None):
        variable = "TMPDIR" if within is None else FOLDER_VARIABLE
        within = within or tempfile.gettempdir()
        remove_abandoned(kind, within)
        while True:
            self.path = tempfile.mkdtemp(prefix=f"{kind}-", dir=within)
            # Before it is locked, another process may take it for an abandoned one and remove it.
            try:
                descriptor = _locked(self.path)
            except (BlockingIOError, FileNotFoundError):
                continue
            except OSError as error:
                shutil.rmtree(self.path, ignore_errors=True)
                raise UserError(_not_locked(self.path, error, variable)) from None
            if os.path.isdir(self.path):
                break
            os.close(descriptor)
        self._remove = weakref.finalize(self, _removed, self.path, descriptor)

    def detach(self) -> Callable[[], None]:
        """Leave the folder to the caller, who removes it by calling the result, however late the interpreter exits."""
        detached = self._remove.detach()
        assert detached is not None
        _, remove, arguments, _ = detached
        return partial(remove, *arguments)

    def cleanup(self) -> None:
        """Remove the folder and its contents. Safe to call twice."""
        self._remove()


def remove_abandoned(kind: str, within: str) -> None:
    """Remove the folders of a kind whose owners are dead, except other users' folders."""
    for path in Path(within).glob(f"{kind}-*"):
        try:
            descriptor = _locked(str(path))
        except OSError:
            continue
        if os.fstat(descriptor).st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _locked(path: str) -> int:
    """A descriptor that holds the folder's lock.

    Raises ``OSError``: ``BlockingIOError`` if the folder is locked elsewhere, ``FileNotFoundError`` if it is gone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _not_locked(path: str, error: OSError, variable: str) -> str:
    remedy = f"name a folder on another file system in {variable}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "raise the limit on open files (ulimit -n)"
    return f"the folder {path} cannot be locked ({error.strerror}); {remedy}"


def _removed(path: str, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)
