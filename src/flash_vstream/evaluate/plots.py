"""Matplotlib without a display."""

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
