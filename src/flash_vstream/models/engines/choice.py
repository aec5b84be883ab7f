"""Which engine a model gets."""

import logging
from typing import Any

from flash_vstream.models.engines.base import Engine
from flash_vstream.models.engines.pytorch import PyTorchEngine

LARGEST = 2_000_000_000
"""Parameters of the largest language model that is run in OpenVINO, which holds a second copy of the weights."""
log = logging.getLogger("flash_vstream.models")


def fastest_engine(model: Any) -> Engine:
    """OpenVINO for a small Llama on a CPU that it supports, else PyTorch.

    A runtime that fails on this machine costs speed, not the answer: the reason is logged.
    """
    if model.device.type == "cpu" and sum(p.numel() for p in model.language_model.parameters()) <= LARGEST:
        try:
            from flash_vstream.models.engines.openvino import OpenVinoEngine
            from flash_vstream.models.engines.openvino_graph import is_supported

            if is_supported(model.language_model.config):
                return OpenVinoEngine(model.language_model)
        except ImportError as error:
            log.info("answers come from PyTorch, which is slower: %s", error)
        except RuntimeError as error:
            log.warning("OpenVINO does not run here, so answers come from PyTorch, which is slower: %s", error)
    return PyTorchEngine(model)
