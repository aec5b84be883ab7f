"""A running stream: frames in, memory kept, questions answered."""

from flash_vstream.stream.api import FlashVStream, Stream

__all__ = ["FlashVStream", "Stream"]
