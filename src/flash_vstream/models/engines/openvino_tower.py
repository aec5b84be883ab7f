"""EfficientNet-Lite in OpenVINO: nano's vision tower on a CPU, in float32.

The features are those of the PyTorch tower up to float32's rounding, so whatever was trained on them stays valid.
"""

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from flash_vstream.models.efficientnet import ConvNorm, EfficientNetLiteModel
from flash_vstream.models.engines.openvino_graph import cpu_options
from flash_vstream.models.engines.openvino_library import import_openvino


class OpenVinoTower(nn.Module):
    """Takes the place of an ``EfficientNetLiteModel``; threads may share it, and take turns.

    With ``blocks``, it has that many of the tower's first blocks and no head, for ``first_blocks`` alone. Raises
    ``RuntimeError`` if OpenVINO does not run on this machine.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, tower: EfficientNetLiteModel, blocks: int | None = None):
        super().__init__()
        self.config = tower.config
        ov: Any = import_openvino()
        compiled = ov.Core().compile_model(_build(ov, tower, blocks), "CPU", cpu_options())
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """See ``EfficientNetLiteModel``."""
        return BaseModelOutput(last_hidden_state=self._infer(pixel_values).flatten(2).transpose(1, 2))

    def first_blocks(self, pixel_values: Tensor) -> Tensor:
        """``EfficientNetLiteModel.first_blocks`` for the number of blocks that it has."""
        return self._infer(pixel_values)

    def _infer(self, pixel_values: Tensor) -> Tensor:
        with self._lock:
            self._request.infer([pixel_values.float().numpy()], share_inputs=True)
            return torch.from_numpy(self._request.get_output_tensor(0).data.copy())


def _build(ov: Any, tower: EfficientNetLiteModel, count: int | None) -> Any:
    """An ``openvino.Model`` of pixels ``[B, 3, H, W]`` to features ``[B, channels, h, w]``; see ``OpenVinoTower``."""
    op: Any = import_openvino("opset13")

    def convolved(x: Any, layer: ConvNorm) -> Any:
        weight, bias = (part.detach().float().contiguous().numpy() for part in layer.folded())
        strides, groups = list(layer.conv.stride), layer.conv.groups
        zeros = [0, 0]
        if groups > 1:
            weight = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
            x = op.group_convolution(x, op.constant(weight), strides, zeros, zeros, [1, 1], "same_upper")
        else:
            x = op.convolution(x, op.constant(weight), strides, zeros, zeros, [1, 1], "same_upper")
        x = op.add(x, op.constant(bias[None, :, None, None]))
        return x if layer.linear else op.clamp(x, 0.0, 6.0)

    size = tower.config.image_size
    pixels = op.parameter([-1, 3, size, size], np.float32, name="pixel_values")
    x = convolved(pixels, tower.stem)
    blocks: Any = tower.blocks
    for block in blocks[:count]:
        y = convolved(x, block.expand) if isinstance(block.expand, ConvNorm) else x
        y = convolved(convolved(y, block.depthwise), block.project)
        x = op.add(x, y) if block.skip else y
    x = x if count is not None else convolved(x, tower.head)
    return ov.Model([op.result(x)], [pixels], "vision_tower")
