"""OpenVINO without its telemetry: the one place that imports it."""

import importlib
import sys
from typing import Any


def import_openvino(part: str | None = None) -> Any:
    """OpenVINO's package, or its module ``part``; raises ``ImportError`` if it is not installed.

    When it is imported, OpenVINO reports that to Google Analytics through the package ``openvino_telemetry``, from a
    process that it starts with multiprocessing. Where that package cannot be imported, it sends nothing.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # importing it raises ImportError
    return importlib.import_module("openvino" if part is None else f"openvino.{part}")
