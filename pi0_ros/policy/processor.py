"""What a processor can do, and on which one a policy runs."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import torch

from pi0_ros.model.linear import cpuinfo
from pi0_ros.policy import gpu
from pi0_ros.wording import first_line

_log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
MANY_PARAMETERS = 50_000_000  # from here on a CPU's time goes into reading weights, and half the bytes pay
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86's two kinds, and ARM's


class PolicyError(ValueError):
    """A policy that cannot be made from what was given."""


def pick_device(device: str, dtype: str, parameters: int = 0) -> tuple[torch.device, torch.dtype]:
    """torch's device and dtype, for a model of so many parameters, for "auto" or names of them. PolicyError for what
    there is not. A GPU that "auto" has to leave alone is told of, once."""
    if dtype not in ("auto", *DTYPES):
        raise PolicyError(f"dtype must be one of auto, {', '.join(DTYPES)}, found {dtype!r}")
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise PolicyError(f"device must be auto, cpu, cuda or cuda:N, found {device!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        why = f": {why_no_gpu()}" if not torch.cuda.device_count() else ""
        raise PolicyError(f"device {device!r} was asked for, torch sees {torch.cuda.device_count()} GPUs{why}")
    if device == "auto" and chosen.type == "cpu":
        _tell_of_idle_gpu()
    if dtype == "float8" and not gpu.has_float8(chosen):
        raise PolicyError(f"dtype float8 needs an NVIDIA GPU that has it (Ada, Hopper or later), device is {chosen}")
    halves = chosen.type == "cuda" or (parameters >= MANY_PARAMETERS and has_bfloat16(chosen))
    automatic = torch.bfloat16 if halves else torch.float32
    return chosen, DTYPES.get(dtype, automatic)


@functools.cache
def _tell_of_idle_gpu() -> None:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # somebody wants it so
    if has_nvidia_gpu() and not hidden:
        _log.warning(
            "this machine has an NVIDIA GPU that torch does not use, so the CPU does the work: %s", why_no_gpu()
        )


def why_no_gpu() -> str:
    """Why torch sees no GPU, in torch's words: no driver, one too old for it, none visible."""
    if not torch.version.cuda and not torch.version.hip:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return first_line(error)
    return "no reason is given"


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether Linux lists a GPU of NVIDIA's, with or without a driver for it: on the PCI bus, or a Jetson's own."""
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        if vendor.read_text().strip() == "0x10de" and (vendor.parent / "class").read_text().startswith("0x03"):
            return True
    board = root / "proc/device-tree/compatible"
    return board.exists() and b"nvidia,tegra" in board.read_bytes()


def gpu_fault() -> str:
    """Why this thread's GPU is lost to this process, or nothing: after some faults every call fails, for good."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return first_line(error)
    return ""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 by itself; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(_BFLOAT16_FLAGS & set(cpuinfo().split()))


@functools.cache
def is_intel() -> bool:
    """Whether the CPU is Intel's: there MKL uses AVX-512 and AMX as oneDNN does; on AMD's it keeps to AVX2."""
    return "GenuineIntel" in cpuinfo()


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this CPU's products go through oneDNN; in bfloat16 not on every one that has it for float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
