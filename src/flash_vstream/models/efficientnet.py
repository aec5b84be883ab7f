"""EfficientNet-Lite as a Transformers vision model: nano's vision tower.

EfficientNet-Lite (Google, 2020) is EfficientNet without squeeze-excite, with ReLU6 and an unscaled
stem and head, which makes it the fastest ImageNet network of its accuracy on a laptop CPU.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# (repeats, kernel, stride, expansion, output channels) of EfficientNet-B0's seven stages.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32


class EfficientNetLiteConfig(PretrainedConfig):
    """Shape of an EfficientNet-Lite; the defaults are Lite2 at 256 pixels."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        image_size: int = 256,
        width: float = 1.1,
        depth: float = 1.2,
        hidden_size: int = 1280,
        batch_norm_eps: float = 1e-3,
        **kwargs: Any,
    ):
        self.image_size = image_size
        self.width = width
        self.depth = depth
        self.hidden_size = hidden_size
        self.batch_norm_eps = batch_norm_eps
        super().__init__(**kwargs)


def _scaled_channels(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded to a multiple of 8 but never down by more than a tenth."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's SAME padding, batch norm, and ReLU6 unless it is linear."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, eps: float, linear: bool = False
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=eps)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        # SAME padding puts the odd pixel on the right and bottom, which Conv2d does not support.
        pad = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in (x.shape[-1], x.shape[-2])]
        if kernel > 1:
            x = F.pad(x, (pad[0] // 2, pad[0] - pad[0] // 2, pad[1] // 2, pad[1] - pad[1] // 2))
        if self.training:
            x = self.norm(conv(x))
        else:
            weight, bias = self.folded()
            x = F.conv2d(x, weight, bias, conv.stride, 0, 1, conv.groups)
        return x if self.linear else F.relu6(x)

    def folded(self) -> tuple[Tensor, Tensor]:
        """The convolution's weight and bias with the batch norm folded in (a third faster), with gradients."""
        norm = self.norm
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = (self.conv.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        return weight, norm.bias - norm.running_mean * scale


class _InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise convolution, project, and a skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, eps: float):
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvNorm(inputs, hidden, 1, 1, 1, eps) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, hidden, eps)
        self.project = ConvNorm(hidden, outputs, 1, 1, 1, eps, linear=True)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite without its classifier.

    ``pixel_values`` ``[B, 3, H, W]``, RGB scaled by (x - 127) / 128; the output's
    ``last_hidden_state`` is the feature map ``[B, H/32 * W/32, hidden_size]`` in row-major order.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["_InvertedResidual"]
    # It has no attention, so any implementation a composite model requests is fine.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        eps = config.batch_norm_eps
        self.stem = ConvNorm(3, _STEM_CHANNELS, 3, 2, 1, eps)
        self.blocks = nn.ModuleList()
        channels = _STEM_CHANNELS
        for stage, (repeats, kernel, stride, expansion, base) in enumerate(_STAGES):
            outputs = _scaled_channels(base, config.width)
            # Lite only scales the depth of the middle stages.
            if 0 < stage < len(_STAGES) - 1:
                repeats = math.ceil(repeats * config.depth)
            for i in range(repeats):
                step = stride if i == 0 else 1
                self.blocks.append(_InvertedResidual(channels, outputs, kernel, step, expansion, eps))
                channels = outputs
        self.head = ConvNorm(channels, config.hidden_size, 1, 1, 1, eps)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.last_blocks(self.first_blocks(pixel_values, 0), 0))

    def first_blocks(self, pixel_values: Tensor, count: int) -> Tensor:
        """What the stem and the first ``count`` blocks make of pixels: ``[B, channels, h, w]``."""
        x: Tensor = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        for block in self.blocks[:count]:
            x = block(x)
        return x

    def last_blocks(self, x: Tensor, skipped: int) -> Tensor:
        """The feature map ``[B, h * w, hidden_size]`` of what ``first_blocks`` made with ``skipped`` blocks."""
        for block in self.blocks[skipped:]:
            x = block(x)
        features: Tensor = self.head(x).flatten(2).transpose(1, 2)
        return features


def convert_lukemelas_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights from the efficientnet-lite-pytorch package's names to this module's.

    Drops the classifier and the batch counters.
    """
    norms = {"_bn0": "expand", "_bn1": "depthwise", "_bn2": "project"}
    convs = {"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project"}
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_fc" or parts[-1] == "num_batches_tracked":
            continue
        if parts[0] == "_blocks":
            unit = f"blocks.{parts[1]}."
            unit += f"{norms[parts[2]]}.norm" if parts[2] in norms else f"{convs[parts[2]]}.conv"
        else:
            unit = {
                "_conv_stem": "stem.conv",
                "_bn0": "stem.norm",
                "_conv_head": "head.conv",
                "_bn1": "head.norm",
            }[parts[0]]
        renamed[f"{unit}.{parts[-1]}"] = value
    return renamed
