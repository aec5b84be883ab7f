"""Faster decoding on CPUs that are fast only in float32.

A decoding step multiplies every weight by a single row, so it takes as long as reading the weights.
PyTorch's matrix-vector product can read float16 weights and accumulate in float32, which halves the
time. For more than one row, float32 is many times faster. So each linear layer keeps both.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class HalfLinear(nn.Linear):
    """A linear layer with a float16 copy of its weight for single-row inputs.

    Weights that were stored in float16 lose no precision; the input row is rounded to float16. A row
    with values beyond float16's range is multiplied in float32.
    """

    half_weight: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "HalfLinear":
        """A copy of ``linear`` that shares its float32 weight."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.register_buffer("half_weight", linear.weight.detach().half(), persistent=False)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == self.in_features and not torch.is_grad_enabled():
            row = input.half()
            if torch.isfinite(row).all():
                output = functional.linear(row, self.half_weight).to(input.dtype)
                return output if self.bias is None else output + self.bias
        return super().forward(input)


def add_float16_copies(language_model: nn.Module) -> None:
    """Replace every linear layer of a float32 language model on a CPU with a ``HalfLinear``, in place."""
    for module in list(language_model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, HalfLinear.from_linear(child))
