"""What makes a saved folder loadable by Transformers' Auto classes where this package has not been imported.

The folder names a small module of its own in ``auto_map``. With ``trust_remote_code=True`` Transformers imports it, and
it imports this package; without the package, Transformers says that flash_vstream is needed and how to install it.
"""

from pathlib import Path

MODULE = "flash_vstream_auto"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.FlashVStreamConfig",
    "AutoModel": f"{MODULE}.FlashVStreamForConditionalGeneration",
    "AutoModelForImageTextToText": f"{MODULE}.FlashVStreamForConditionalGeneration",
    "AutoProcessor": f"{MODULE}.FlashVStreamProcessor",
}
_SOURCE = '''"""Loads the model with the package flash_vstream, which must be installed."""

from flash_vstream.models import (  # noqa: F401
    FlashVStreamConfig,
    FlashVStreamForConditionalGeneration,
    FlashVStreamProcessor,
)
'''


def write_module(folder: Path) -> None:
    """Write the module that ``AUTO_MAP`` names."""
    (folder / f"{MODULE}.py").write_text(_SOURCE)
