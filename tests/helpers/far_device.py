"""A device that is not the CPU, for machines without one: its tensors compute, but mix with no others, as on CUDA.

PyTorch's meta device lends its name. A ``FarTensor`` says that it is there and has its values on the CPU, where
``FarMode`` computes with them. Whatever CUDA refuses is refused: a tensor of each device in one operation, or an index
that is far away for a tensor that is not.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAR = "meta"
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten._unsafe_index.Tensor,
}


class FarTensor(torch.Tensor):
    """A tensor on the far device."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> "FarTensor":
        shape = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, device=FAR, requires_grad=False, **shape)
        far.near = near
        return far

    def __repr__(self) -> str:
        return f"far {self.near!r}"

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def far(value: torch.Tensor) -> FarTensor:
    """``value`` on the far device."""
    return FarTensor(value.detach().clone())


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of PyTorch on the values, and say where its result is."""
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = any(isinstance(value, FarTensor) for value in given)
    checked = given
    if func in _INDEXED:
        index = [value for value in tree_flatten(args[1])[0] if isinstance(value, torch.Tensor)]
        if not isinstance(args[0], FarTensor) and any(isinstance(value, FarTensor) for value in index):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        checked = [args[0], *args[2:3]]
    if func not in _COPIES and there:
        mixed = [value for value in checked if not isinstance(value, FarTensor) and value.dim() > 0]
        if mixed and any(isinstance(value, FarTensor) for value in checked):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} was given both")
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == FAR
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], FarTensor)
    result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    if not there:
        return result
    # What is changed in place stays the tensor that it is.
    own = {id(value.near): value for value in given if isinstance(value, FarTensor)}

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return own[id(value)] if id(value) in own else FarTensor(value)

    return tree_map(placed, result)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, FarTensor) else value


class _FarValues(TorchFunctionMode):
    """Values in Python that become tensors before any operation is called that ``FarMode`` could see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == FAR:
            return far(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1], dtype=torch.long)]
        return func(*args, **kwargs)


class FarMode(TorchDispatchMode):
    """Within it, tensors that are made on the far device have values."""

    def __enter__(self):
        self._values = _FarValues()
        self._values.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._values.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})
