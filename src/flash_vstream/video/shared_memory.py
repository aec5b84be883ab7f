"""Files that processes share, in a folder that is best kept in memory.

Knows sizes and owners; knows nothing of what is in the files.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

from flash_vstream.errors import UserError

FOLDER_VARIABLE = "FLASH_VSTREAM_SHARED_FOLDER"
"""Names another folder than /dev/shm, on disk if need be: containers often have 64 MB of shared memory."""
_ZEROS = bytes(2**20)


def shared_folder() -> str:
    """Where shared files go: the folder that ``FLASH_VSTREAM_SHARED_FOLDER`` names, /dev/shm, or the one for
    temporary files.

    Raises ``UserError`` when the variable names no folder that can be written.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        if not (os.path.isdir(named) and os.access(named, os.W_OK | os.X_OK)):
            raise UserError(f"{FOLDER_VARIABLE} is {named!r}, which is not a folder that can be written; name another")
        return named
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()


def reserve(path: str, size: int) -> None:
    """Make a file of ``size`` zero bytes at ``path``, with all of its space taken.

    Raises ``UserError`` when there is too little space; no file is left then.
    """
    try:
        with open(path, "wb") as file:
            take_space(file, size)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def take_space(file: IO[bytes], size: int) -> None:
    """Make an empty file ``size`` bytes long, all of them there.

    A mapped file whose space was not taken ends the process that writes to it (SIGBUS) once the folder is full.
    Raises ``UserError`` when there is too little space.
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
    """Raise ``UserError`` unless ``folder`` has ``size`` bytes left."""
    space = os.statvfs(folder)
    if space.f_bavail * space.f_frsize < size:
        raise UserError(_too_little(size, f"{folder} is full"))


def _too_little(size: int, reason: str) -> str:
    return (
        f"there is no room for {size / 1e6:.1f} MB of shared memory ({reason}); watch fewer streams, give the machine"
        f" or container more (docker run --shm-size), or name a folder on disk in {FOLDER_VARIABLE}"
    )


class OwnedFolder:
    """A folder that is removed with its owner, or at the next start if the owner was killed.

    The owner holds a lock (flock) on the folder. The kernel releases it however the process ends, so a folder
    without a lock is nobody's; unlike a process id, a lock also holds between containers that share the folder
    above. Making one first removes those of the same ``kind`` that nobody owns.
    """

    def __init__(self, kind: str, within: str | None = None):
        within = within or tempfile.gettempdir()
        remove_abandoned(kind, within)
        while True:
            self.path = tempfile.mkdtemp(prefix=f"{kind}-", dir=within)
            descriptor = _locked(self.path)
            # In the moment before it was locked, another process may have taken it for an abandoned one.
            if descriptor is not None and os.path.isdir(self.path):
                break
            if descriptor is not None:
                os.close(descriptor)
        self._remove = weakref.finalize(self, _removed, self.path, descriptor)

    def cleanup(self) -> None:
        """Remove the folder with what is in it; may be called again."""
        self._remove()


def remove_abandoned(kind: str, within: str) -> None:
    """Remove the folders of a kind whose owners are dead; other users' are left alone."""
    for path in Path(within).glob(f"{kind}-*"):
        descriptor = _locked(str(path))
        if descriptor is not None:
            if os.fstat(descriptor).st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)


def _locked(path: str) -> int | None:
    """A descriptor of the folder that holds its lock; None when another has it, or it is gone or not ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _removed(path: str, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)
