"""What a processor can do."""

from __future__ import annotations

from pathlib import Path

import torch

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86's two kinds, and ARM's


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 by itself; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool(_BFLOAT16_FLAGS & set(cpuinfo.read_text(errors="replace").split()))


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this CPU's products go through oneDNN; in bfloat16 not on every one that has it for float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
