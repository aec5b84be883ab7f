"""Chooses the fastest dtype for a device."""

import functools
import time

import torch


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 if ``device`` is fast in it (GPUs, CPUs with AMX, some with AVX512-BF16), else float32."""
    return torch.bfloat16 if device != "cpu" or _cpu_is_fast_in_bfloat16() else torch.float32


@functools.cache
def _cpu_is_fast_in_bfloat16() -> bool:
    """Whether bfloat16 beats float32 on this CPU: always with AMX, by measurement with AVX512-BF16.

    AVX512-BF16 has been measured at both four times and half of float32's speed.
    """
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return True
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return False
    return _product_seconds(torch.bfloat16) < 0.8 * _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """The shortest time of ten matrix products of the size of nano's layers when reading a prompt."""
    rows, weight = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
