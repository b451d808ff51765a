"""All layers of the action expert as one kernel for Hopper GPUs: compiles and launches `hopper/layers.cu`."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pi0_ros.model.config import Pi0Config
from pi0_ros.model.gemma import RMS_EPS
from pi0_ros.policy.fused import Fused

_log = logging.getLogger(__name__)
SWITCH = "PI0_ROS_WHOLE_STEPS"
SOURCES = Path(__file__).parent / "hopper"
CLUSTER, THREADS = 4, 384  # blocks of a cluster, threads of a block
MOST, LEAST = 32, 26  # clusters: more would have nothing to do, or columns for which there is no instruction
MEMORY = 232448  # bytes of shared memory, all that a block may have


@dataclass(frozen=True)
class Kernel:
    """`layers.cu` compiled for so many clusters: `launch` takes packed `Params`, and `encode` makes what it takes for a
    view of [layers, rows, columns] by tiles of so many rows."""

    clusters: int
    launch: Callable[[bytes], None]
    encode: Callable[[Tensor, int], bytes]


def kernel_for(config: Pi0Config, device: torch.device) -> Kernel | None:
    """The kernel, where it is for this: gemma_300m as the expert, rows of one tile, Hopper, NVIDIA's bindings.

    `PI0_ROS_WHOLE_STEPS=0` in the environment: nowhere.

    Raises:
        RuntimeError: what NVIDIA's compiler or driver says.
    """
    expert = config.expert
    sizes = expert.width, expert.mlp_dim, expert.num_heads, expert.num_kv_heads, expert.head_dim
    if sizes != (1024, 4096, 8, 1, 256) or config.suffix_len > 64 or device.type != "cuda":
        return None
    if (
        os.environ.get(SWITCH) == "0"
        or torch.cuda.get_device_capability(device) != (9, 0)
        or not importlib.util.find_spec("cuda")
    ):
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        clusters = min(room(index), MOST)
        if clusters < max(LEAST, config.suffix_len * expert.num_heads / 16):
            return None
        return compiled(clusters, config.pi05, index)


def tensor_map(tensor: Tensor, rows: int) -> bytes:
    """A CUtensorMap of bfloat16 [layers, rows, columns], by tiles of [1, `rows`, 64], swizzled over 128 bytes."""
    from cuda.bindings import driver

    layers, height, width = tensor.shape
    small, large = driver.cuuint32_t, driver.cuuint64_t
    encoded = _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            tensor.data_ptr(),
            [large(size) for size in (width, height, layers)],
            [large(2 * tensor.stride(1)), large(2 * tensor.stride(0))],
            [small(size) for size in (64, rows, 1)],
            [small(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return struct.pack("16Q", *(int(word) for word in encoded.opaque))


class ExpertLayers:
    """A step's layers in one launch.

    Args:
        weights: its expert's matrices are put behind one another, as views of one tensor for each kind.
        buffers: the names that `layers.cu` has for them, in the order of its `Params`, from `tokens` on.
        tiles: how many sums of squares a row of tokens comes with.
    """

    def __init__(
        self, kernel: Kernel, config: Pi0Config, weights: Fused, times: int, *, buffers: dict[str, Tensor], tiles: int
    ) -> None:
        self.kernel, self.buffers, expert = kernel, buffers, config.expert
        self._sizes = config.suffix_len, buffers["keys"].shape[-2], buffers["squares"].shape[-1], tiles
        self._depth, self._times = expert.depth, times
        activations = buffers["scaled"], buffers["mixed"], buffers["gated"]
        layers, clusters = weights.expert, kernel.clusters
        self._matrices = [
            (_stacked([layer.qkv for layer in layers]), _largest(10 * expert.head_dim, clusters)),
            (_stacked([layer.out for layer in layers]), _largest(expert.width, clusters)),
            (_stacked([layer.geglu.both for layer in layers]), _largest(expert.mlp_dim, clusters * CLUSTER)),
            (_stacked([layer.down for layer in layers]), _largest(expert.width, clusters)),
        ]
        maps = [kernel.encode(rows[None], 64) for rows in activations]
        self._maps = b"".join(maps + [kernel.encode(*matrix) for matrix in self._matrices])
        self._counter = torch.zeros(2, dtype=torch.int32, device=buffers["tokens"].device)

    def run(self, when: Tensor, first: int, rows: int, prefix_rows: int, *, with_state: bool) -> None:
        """Over `rows` suffix tokens from `first` on, with `prefix_rows` of the cache before the suffix.

        `when`: int32 [rows], each token's entry in the time tables.
        """
        pointers = [tensor.data_ptr() for tensor in (self.buffers | {"when": when}).values()]
        numbers = self._depth, self._times, first, rows, prefix_rows, *self._sizes, with_state
        pointers.append(self._counter.data_ptr())
        params = self._maps + struct.pack(f"{len(pointers)}Q{len(numbers)}i", *pointers, *numbers)
        self.kernel.launch(params + bytes(-len(params) % 64))  # as a struct with tensor maps is padded


def _stacked(linears: Sequence) -> Tensor:
    """The matrices [layers, out, in]; each linear's weight is a view of it from now on."""
    stack = torch.stack([linear.weight for linear in linears])
    for linear, weight in zip(linears, stack, strict=True):
        linear.transposed = weight.t()
    return stack


def constants(clusters: int, adaptive: bool) -> dict[str, object]:
    """The macros that `layers.cu` is compiled with."""
    return {"ADAPTIVE": int(adaptive), "RMS_EPS": f"{RMS_EPS}f", "CLUSTERS": clusters, "MEMORY": MEMORY}


def _largest(columns: int, shares: int) -> int:
    return 8 * -(-columns // 8 // shares)


@functools.cache
def room(device: int) -> int:
    """How many clusters of blocks that take all the shared memory `device`, the current one, has room for at once."""
    from cuda.bindings import driver

    probe = f'extern "C" __global__ void __cluster_dims__({CLUSTER}, 1, 1) layers() {{}}'
    shape = driver.CUlaunchAttribute()
    shape.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    shape.value.clusterDim.x, shape.value.clusterDim.y, shape.value.clusterDim.z = CLUSTER, 1, 1
    return _checked(driver.cuOccupancyMaxActiveClusters(_load(probe.encode(), {}), _configured(LEAST, shape)))


@functools.cache
def compiled(clusters: int, adaptive: bool, device: int) -> Kernel:
    """The kernel for `device`, the current one.

    Raises:
        RuntimeError: what NVIDIA's compiler or driver says.
    """
    from cuda.bindings import driver

    function = _load((SOURCES / "layers.cu").read_bytes(), constants(clusters, adaptive))
    together = driver.CUlaunchAttribute()  # its blocks wait for one another: all of them at once, or the driver refuses
    together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    together.value.cooperative = 1

    def launch(params: bytes) -> None:
        config = _configured(clusters, together)
        config.hStream = torch.cuda.current_stream().cuda_stream
        packed = ctypes.create_string_buffer(params, len(params))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(packed))
        _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0))

    return Kernel(clusters, launch, tensor_map)


def machine_code(source: bytes, constants: Mapping[str, object]) -> bytes:
    """A CUDA source compiled for Hopper, with these macros.

    Raises:
        RuntimeError: what NVIDIA's compiler says.
    """
    from cuda.bindings import nvrtc

    headers = {path.name.encode(): path.read_bytes() for path in SOURCES.glob("*.h")}
    program = nvrtc.nvrtcCreateProgram(source, b"layers.cu", len(headers), list(headers.values()), list(headers))
    program = _checked(program)
    options = ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{name}={value}" for name, value in constants.items())]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))  # bytes of one space would be Python's only ones
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    said = log.decode(errors="replace").strip(" \0\n")
    if failed:
        raise RuntimeError(f"layers.cu does not compile: {said}")
    if said:
        _log.warning("layers.cu: %s", said)
    image = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, image))
    return bytes(image)


def _load(source: bytes, constants: Mapping[str, object]):
    """The function `layers` of a CUDA source, for good: a few hundred kilobytes, once for each kind of model."""
    from cuda.bindings import driver

    module = _checked(driver.cuModuleLoadData(machine_code(source, constants)))
    function = _checked(driver.cuModuleGetFunction(module, b"layers"))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, most, MEMORY))
    return function


def _configured(clusters: int, attribute):
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.blockDimX, config.sharedMemBytes = clusters * CLUSTER, THREADS, MEMORY
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.attrs, config.numAttrs = [attribute], 1
    return config


def _checked(answer: tuple):
    """What one of NVIDIA's functions gives besides its error code, which has to be zero."""
    error, *rest = answer
    if error:
        raise RuntimeError(f"{type(error).__name__}: {error.name}")
    return rest[0] if rest else None
