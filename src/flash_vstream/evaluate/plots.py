"""Matplotlib without a display."""

from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError


def pyplot() -> Any:
    """Import pyplot with the headless backend. Raises ``UserError`` when Matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib; install flash-vstream[eval]") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def check_plot(output: Path | None) -> None:
    """Raise ``UserError``, before anything is measured, if a plot could not be written to ``output``."""
    if output is None:
        return
    if output.suffix not in (".png", ".svg"):
        raise UserError(f"--output {output} must end in .png or .svg")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it, or name another")
    pyplot()
