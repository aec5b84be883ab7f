"""Which engine a model gets unless one is chosen."""

import logging

import torch

from flash_vstream.models.engines.base import Engine
from flash_vstream.models.engines.pytorch import PyTorchEngine
from flash_vstream.models.half_linear import add_float16_copies
from flash_vstream.models.interface import StreamModel
from flash_vstream.models.stream_parts import StreamParts

LARGEST = 2_000_000_000
"""Parameters of the largest language model that runs in OpenVINO, whose copy of the weights stands beside PyTorch's."""
log = logging.getLogger("flash_vstream.models")


def fastest_engine(model: StreamModel) -> Engine:
    """OpenVINO for a Llama of this project's models on a CPU, else PyTorch.

    Where OpenVINO is missing or does not run, answers are as good and take longer; the reason is logged.
    """
    from flash_vstream.models.light import LightModel

    if isinstance(model, LightModel):
        from flash_vstream.models.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(model, model.compiled())
    if not isinstance(model, StreamParts) or model.device.type != "cpu":
        return PyTorchEngine(model)
    if sum(parameter.numel() for parameter in model.language_model.parameters()) <= LARGEST:
        try:
            from flash_vstream.models.engines.openvino import OpenVinoEngine
            from flash_vstream.models.engines.openvino_graph import is_supported

            if is_supported(model.language_model.config):
                return OpenVinoEngine(model)
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            log.warning("OpenVINO does not run here (%s), so answers come from PyTorch and take longer", error)
    if model.dtype == torch.float32:
        add_float16_copies(model.language_model)
    return PyTorchEngine(model)


def speed_up_vision(model: StreamModel) -> None:
    """Put OpenVINO's form of nano's vision tower in place of PyTorch's on a CPU, if it runs here."""
    from flash_vstream.models.light import LightModel

    if isinstance(model, LightModel):
        model.open_tower()
        return
    from flash_vstream.models.efficientnet import EfficientNetLiteModel

    tower = getattr(model, "vision_tower", None)
    if isinstance(tower, EfficientNetLiteModel) and model.device.type == "cpu":
        try:
            from flash_vstream.models.engines.openvino_tower import OpenVinoTower

            model.vision_tower = OpenVinoTower(tower, model.config.pooled_size)  # type: ignore[attr-defined]
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            log.warning("OpenVINO does not run here (%s), so frames are encoded by PyTorch and take longer", error)
