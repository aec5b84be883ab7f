"""A Llama as an OpenVINO graph with 8-bit weights and paged attention.

Weights are rounded to 8 bits in groups of up to 64 along the input, each group with a float16 scale: less than one
part in 250 of a group's largest weight, if that is at least 0.001. Embeddings come in and logits go out, so the vision
side does not matter here.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flash_vstream.models.engines.openvino_library import import_openvino

GROUPS = (64, 32, 16, 8)
"""Sizes of a group of weights that share a scale, best first; the first that divides a layer's inputs is used."""


def cpu_options() -> dict[str, Any]:
    """OpenVINO's options for running on a CPU that other processes use as well."""
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # Two workers that are pinned to the same cores would wait for each other.
        "ENABLE_CPU_PINNING": False,
        # The same on every processor: OpenVINO would choose bfloat16 where it has the instructions.
        "INFERENCE_PRECISION_HINT": "f32",
    }


def is_supported(config: Any) -> bool:
    """Whether a Transformers configuration is of a Llama with nothing that the graph lacks."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type == "llama"
        and config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and rope.get("rope_type", "default") == "default"
    )


def build_graph(language_model: Any) -> Any:
    """An ``openvino.Model`` of a Llama, its attention in the form that ``PagedAttention`` replaces.

    Inputs: ``inputs_embeds [B, L, width]``, ``attention_mask``, ``position_ids`` and ``beam_idx``, as the replacement
    expects them, and ``rows``, the places whose ``logits`` are wanted.
    """
    return _Builder(language_model).model()


class _Builder:
    """Builds the graph layer by layer; ``op`` is OpenVINO's set of operations."""

    def __init__(self, language_model: Any):
        self.ov: Any = import_openvino()
        self.op: Any = import_openvino("opset13")
        self.language_model = language_model
        config = language_model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.epsilon = config.rms_norm_eps
        self.base = (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or config.rope_theta
        self.assigns: list[Any] = []

    def model(self) -> Any:
        op, decoder = self.op, self.language_model.model
        embeds = self._input("inputs_embeds", [-1, -1, self.language_model.config.hidden_size], np.float32)
        mask = self._input("attention_mask", [-1, -1], np.int64)
        positions = self._input("position_ids", [-1, -1], np.int64)
        beams = self._input("beam_idx", [-1], np.int32)
        rows = self._input("rows", [-1], np.int64)
        batch = op.gather(op.shape_of(embeds), self._ints([0]), self._ints(0))
        rotary = self._rotary(positions)
        # The replacement reads the mask only to find the pattern; PagedAttention is causal by itself.
        bias = op.select(
            op.convert(op.unsqueeze(op.unsqueeze(mask, self._ints(1)), self._ints(1)), "boolean"),
            self._floats(0.0),
            self._floats(float(np.finfo(np.float32).min)),
        )
        hidden = embeds
        for i, layer in enumerate(decoder.layers):
            inner = self._norm(hidden, layer.input_layernorm)
            hidden = op.add(hidden, self._attention(inner, layer.self_attn, rotary, bias, (batch, beams), i))
            inner = self._norm(hidden, layer.post_attention_layernorm)
            gate = op.swish(self._linear(inner, layer.mlp.gate_proj))
            inner = op.multiply(gate, self._linear(inner, layer.mlp.up_proj))
            hidden = op.add(hidden, self._linear(inner, layer.mlp.down_proj))
        width = self.language_model.config.hidden_size
        hidden = op.gather(op.reshape(hidden, self._ints([-1, width]), False), rows, self._ints(0))
        logits = self._linear(self._norm(hidden, decoder.norm), self.language_model.lm_head)
        result = op.result(logits)
        result.output(0).get_tensor().set_names({"logits"})
        return self.ov.Model([result], self.assigns, [embeds, mask, positions, beams, rows], "language_model")

    def _attention(self, x: Any, layer: Any, rotary: Any, bias: Any, state: Any, index: int) -> Any:
        op = self.op
        query = self._rotated(self._split(self._linear(x, layer.q_proj), self.heads), *rotary)
        key = self._rotated(self._split(self._linear(x, layer.k_proj), self.kv_heads), *rotary)
        value = self._split(self._linear(x, layer.v_proj), self.kv_heads)
        key, value = self._kept(key, f"key.{index}", *state), self._kept(value, f"value.{index}", *state)
        seen = op.scaled_dot_product_attention(query, self._repeated(key), self._repeated(value), bias)
        seen = op.transpose(seen, self._ints([0, 2, 1, 3]))
        return self._linear(op.reshape(seen, self._ints([0, 0, self.heads * self.size]), True), layer.o_proj)

    def _rotary(self, positions: Any) -> tuple[Any, Any]:
        """Cosine and sine ``[B, 1, L, size]`` of the rotary embedding's angles."""
        op = self.op
        rates = 1.0 / self.base ** (np.arange(0, self.size, 2, dtype=np.float32) / self.size)
        angles = op.multiply(op.unsqueeze(op.convert(positions, "f32"), self._ints(-1)), op.constant(rates[None, None]))
        both = op.unsqueeze(op.concat([angles, angles], -1), self._ints(1))
        return op.cos(both), op.sin(both)

    def _rotated(self, x: Any, cosine: Any, sine: Any) -> Any:
        op = self.op
        halves = op.variadic_split(x, self._ints(-1), self._ints([self.size // 2] * 2))
        swapped = op.concat([op.multiply(halves.output(1), self._floats(-1.0)), halves.output(0)], -1)
        return op.add(op.multiply(x, cosine), op.multiply(swapped, sine))

    def _split(self, x: Any, heads: int) -> Any:
        """``[B, L, heads * size]`` to ``[B, heads, L, size]``."""
        shaped = self.op.reshape(x, self._ints([0, 0, heads, self.size]), True)
        return self.op.transpose(shaped, self._ints([0, 2, 1, 3]))

    def _kept(self, new: Any, name: str, batch: Any, beams: Any) -> Any:
        """``new`` keys or values after those of earlier calls."""
        op, util = self.op, self.ov.op.util
        info = util.VariableInfo()
        info.data_shape = self.ov.PartialShape([-1, self.kv_heads, -1, self.size])
        info.data_type, info.variable_id = self.ov.Type.f32, name
        variable = util.Variable(info)
        shape = op.concat([batch, self._ints([self.kv_heads]), self._ints([0]), self._ints([self.size])], 0)
        past = op.read_value(op.broadcast(self._floats(0.0), shape), variable)
        kept = op.concat([op.gather(past, beams, self._ints(0)), new], 2)
        self.assigns.append(op.assign(kept, variable))
        return kept

    def _repeated(self, x: Any) -> Any:
        """Every key or value head once for each of its query heads."""
        op, shape = self.op, self.op.shape_of(x)
        start, end = (
            op.gather(shape, self._ints([0, 1]), self._ints(0)),
            op.gather(shape, self._ints([2, 3]), self._ints(0)),
        )
        target = op.concat([start, self._ints([self.heads // self.kv_heads]), end], 0)
        wide = op.broadcast(op.unsqueeze(x, self._ints(2)), target, "BIDIRECTIONAL")
        return op.reshape(wide, self._ints([0, self.heads, -1, self.size]), True)

    def _norm(self, x: Any, layer: Any) -> Any:
        op = self.op
        mean = op.reduce_mean(op.power(x, self._floats(2.0)), self._ints([-1]), True)
        scale = op.divide(self._floats(1.0), op.sqrt(op.add(mean, self._floats(self.epsilon))))
        return op.multiply(op.multiply(x, scale), op.constant(layer.weight.detach().float().numpy()))

    def _linear(self, x: Any, layer: Any) -> Any:
        op = self.op
        values, scales = quantized(layer.weight.detach())
        weight = op.multiply(op.convert(op.constant(values.numpy()), "f16"), op.constant(scales.numpy()))
        weight = op.reshape(weight, self._ints(list(layer.weight.shape)), False)
        return op.matmul(x, op.convert(weight, "f32"), False, True)

    def _input(self, name: str, shape: list[int], dtype: Any) -> Any:
        parameter = self.op.parameter(shape, dtype, name=name)
        parameter.output(0).get_tensor().set_names({name})
        return parameter

    def _ints(self, values: int | list[int]) -> Any:
        return self.op.constant(np.array(values, dtype=np.int64))

    def _floats(self, value: float) -> Any:
        return self.op.constant(np.float32(value))


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[outputs, inputs]`` as int8 values ``[outputs, n, size]`` and float16 scales ``[outputs, n, 1]``."""
    outputs, inputs = weight.shape
    size = next((size for size in GROUPS if inputs % size == 0), inputs)
    groups = weight.float().view(outputs, inputs // size, size)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
    # Float16 rounds a scale to zero if no weight of its group exceeds 4e-6: these weights all become zero.
    values = (groups / scales.float().where(scales > 0, 1.0)).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales
