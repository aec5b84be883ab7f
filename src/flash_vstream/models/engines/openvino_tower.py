"""EfficientNet-Lite in OpenVINO: nano's vision tower on a CPU, in float32.

The features are those of the PyTorch tower up to float32's rounding, so whatever was trained on them stays valid.
OpenVINO pools them as well: right after it has run, PyTorch's threads would wait milliseconds for its own, which still
spin.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flash_vstream.models.engines.openvino_graph import cpu_options
from flash_vstream.models.engines.openvino_library import import_openvino

if TYPE_CHECKING:  # with it comes Transformers, whose import takes seconds
    from flash_vstream.models.efficientnet import ConvNorm, EfficientNetLiteModel


TOGETHER = 4
"""Frames that go through the tower at once: what a layer makes of more does not fit a processor's caches."""


@dataclass(frozen=True)
class TowerOutput:
    """The pooled feature map ``[B, side², channels]``, named as Transformers names a tower's output."""

    last_hidden_state: Tensor


class OpenVinoTower(nn.Module):
    """Takes the place of an ``EfficientNetLiteModel``; threads may share it, and take turns.

    Feature maps are pooled to ``side``, if it is given. ``tower`` may also be a file of ``save_tower``, together with
    its ``config``. With ``blocks``, it has that many of the tower's first blocks and no head, for ``first_blocks``
    alone. Raises ``RuntimeError`` if OpenVINO does not run on this machine.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self,
        tower: "EfficientNetLiteModel | Path",
        side: int | None = None,
        *,
        blocks: int | None = None,
        config: Any = None,
    ):
        super().__init__()
        self.config = config if isinstance(tower, Path) else tower.config
        core: Any = import_openvino().Core()
        graph = core.read_model(tower) if isinstance(tower, Path) else _build(tower, side, blocks)
        compiled = core.compile_model(graph, "CPU", cpu_options())
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()

    def forward(self, pixel_values: Tensor, **_: Any) -> TowerOutput:
        """See ``EfficientNetLiteModel``."""
        return TowerOutput(last_hidden_state=self._infer(pixel_values).flatten(2).transpose(1, 2))

    def first_blocks(self, pixel_values: Tensor) -> Tensor:
        """``EfficientNetLiteModel.first_blocks`` for the number of blocks that it has."""
        return self._infer(pixel_values)

    def _infer(self, pixel_values: Tensor) -> Tensor:
        with self._lock:
            parts = [self._infer_part(part) for part in pixel_values.float().split(TOGETHER)]
        return torch.from_numpy(np.concatenate(parts))

    def _infer_part(self, pixels: Tensor) -> np.ndarray:
        self._request.infer([pixels.numpy()], share_inputs=True)
        features: np.ndarray = self._request.get_output_tensor(0).data.copy()
        return features


def save_tower(tower: "EfficientNetLiteModel", side: int, path: Path) -> None:
    """Store a tower's graph with maps pooled to ``side``, and its weights beside it, for ``OpenVinoTower``."""
    import_openvino().save_model(_build(tower, side, None), path, compress_to_fp16=False)


def _build(tower: "EfficientNetLiteModel", side: int | None, count: int | None) -> Any:
    """An ``openvino.Model`` of pixels ``[B, 3, H, W]`` to features ``[B, channels, h, w]``; see ``OpenVinoTower``."""
    ov: Any = import_openvino()
    op: Any = import_openvino("opset13")

    def convolved(x: Any, layer: "ConvNorm") -> Any:
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
        y = x if isinstance(block.expand, nn.Identity) else convolved(x, block.expand)
        y = convolved(convolved(y, block.depthwise), block.project)
        x = op.add(x, y) if block.skip else y
    x = x if count is not None else convolved(x, tower.head)
    if side is not None:
        source = x.output(0).get_partial_shape()[2].get_length()
        stride = source // side
        x = op.avg_pool(x, [stride, stride], [0, 0], [0, 0], [stride, stride], True)
    return ov.Model([op.result(x)], [pixels], "vision_tower")
