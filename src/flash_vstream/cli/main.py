"""The command line; each command has its own module in this package."""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from flash_vstream.cli import ablate, ask, bench, demo, evaluate, models, search, serve, train, vstream_qa, watch
from flash_vstream.errors import UserError

DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""What the disk says where there is no room, or nothing may be written."""
NAME_ERRORS = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY}
"""What it says to a file or folder that a user should name differently."""

app = typer.Typer(
    name="flash-vstream",
    help="Watch a video stream of any length in constant memory, and answer questions about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: tuple[Callable[..., None], ...] = (
    *(ask.ask, watch.watch, serve.serve, search.search, demo.demo),
    *(models.models, models.pull, bench.bench, ablate.ablate),
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.add_typer(vstream_qa.app, name="vstream-qa")


def main() -> None:
    """Run the command line; a ``UserError``, or a disk that refuses, prints one message on stderr and exits with 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters the terminal cannot show must not abort an answer
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be handled, not at interpreter exit
    except UserError as error:
        print(f"flash-vstream: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # such as: flash-vstream ask … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS | NAME_ERRORS:
            raise
        name = error.filename2 or error.filename  # of a file that was to be renamed, its new name
        what = f"{name}: {error.strerror}" if name else str(error.strerror)
        remedy = "make room or make it writable, or name another" if error.errno in DISK_ERRORS else "name another path"
        print(f"flash-vstream: {what}; {remedy}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from flash_vstream import __version__

        print(__version__)
        raise typer.Exit
