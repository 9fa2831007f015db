"""CUDA calls of the TensorRT backend, each checked; uses cuda-python, without torch."""

from __future__ import annotations

import ctypes
import importlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.console import install_command
from nvembed_deploy.errors import DeviceMismatchError, EngineError, MissingExtra

DRIVER_LIBRARY = "libcuda.so.1"
OLD_DRIVER = "cudaErrorInsufficientDriver"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """A GPU."""

    index: int
    name: str
    compute_capability: str
    """Compute capability, such as `8.9`."""
    bus: str
    """PCI bus address, such as `00000000:65:00.0`."""


class CudaRuntime:
    """CUDA runtime calls that raise exceptions.

    Args:
        api: The module `cuda.bindings.runtime`, or an object with the same functions.
    """

    def __init__(self, api: Any) -> None:
        self.api = api

    @classmethod
    def load(cls) -> CudaRuntime:
        """Loads cuda-python after checking for a driver.

        Raises:
            DeviceMismatchError: There is no NVIDIA driver.
            MissingExtra: cuda-python is not installed.
        """
        try:
            ctypes.CDLL(DRIVER_LIBRARY)
        except OSError:
            raise DeviceMismatchError(f"no NVIDIA driver was found ({DRIVER_LIBRARY} cannot be loaded)") from None
        try:
            return cls(importlib.import_module("cuda.bindings.runtime"))
        except ImportError as err:
            raise MissingExtra(
                f"cuda-python is not installed ({err}); install it: {install_command('rtx')} or "
                f"{install_command('trt')} (JetPack 6: pip install 'cuda-bindings~=12.6')"
            ) from err

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the API.

        Returns:
            The function's first return value, or None.

        Raises:
            EngineError: The function returned an error.
        """
        error, *outputs = getattr(self.api, name)(*arguments)
        if int(error) != 0:
            raise EngineError(f"CUDA call {name} failed: {getattr(error, 'name', error)}")
        return outputs[0] if outputs else None

    def release(self, name: str, *arguments: Any) -> None:
        """Calls a function that frees a resource; a failure is only logged, because nothing can be done about it."""
        try:
            self.call(name, *arguments)
        except EngineError as err:
            _log.debug("%s", err)

    def device(self, index: int) -> CudaDevice:
        """Describes a GPU.

        Raises:
            DeviceMismatchError: There is no GPU with this index.
        """
        try:
            count = self.call("cudaGetDeviceCount")
        except EngineError as err:
            cure = ""
            if OLD_DRIVER in str(err):
                cure = "; the driver is older than cuda-python: update it, or pip install 'cuda-bindings~=12.6'"
            raise DeviceMismatchError(f"no CUDA device is usable ({err}){cure}") from err
        if not 0 <= index < count:
            raise DeviceMismatchError(f"CUDA device {index} was requested, but the number of devices is {count}")
        properties = self.call("cudaGetDeviceProperties", index)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return CudaDevice(
            index=index,
            name=name.rstrip("\0"),
            compute_capability=f"{properties.major}.{properties.minor}",
            bus=f"{properties.pciDomainID:08x}:{properties.pciBusID:02x}:{properties.pciDeviceID:02x}.0",
        )

    def copy_to_device(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        """Queues a copy from pinned host memory to the device."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def copy_to_host(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        """Queues a copy from the device to pinned host memory."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)


class Buffer:
    """A pinned host buffer and a device buffer of the same size, which grow with the largest batch."""

    def __init__(self, cuda: CudaRuntime) -> None:
        self._cuda = cuda
        self.size_bytes = 0
        self.host = 0
        self.device = 0

    def reserve(self, size_bytes: int) -> None:
        """Grows the buffers to at least `size_bytes`; growing discards their content.

        Raises:
            EngineError: There is not enough memory.
        """
        if size_bytes <= self.size_bytes:
            return
        self.free()
        try:
            self.host = int(self._cuda.call("cudaHostAlloc", size_bytes, 0))
            self.device = int(self._cuda.call("cudaMalloc", size_bytes))
        except EngineError as err:
            self.free()
            raise EngineError(
                f"a buffer of {size_bytes} bytes cannot be allocated ({err}); pass a smaller batch_size or max_length"
            ) from err
        self.size_bytes = size_bytes

    def array(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Returns the host buffer as an array, which shares its memory and must not outlive it."""
        size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = memoryview((ctypes.c_char * size_bytes).from_address(self.host))
        array: NDArray[Any] = np.frombuffer(memory, dtype=dtype).reshape(shape)
        return array

    def free(self) -> None:
        """Frees both buffers."""
        allocations = (("cudaFreeHost", self.host), ("cudaFree", self.device))
        self.size_bytes = self.host = self.device = 0
        for name, pointer in allocations:
            if pointer:
                self._cuda.release(name, pointer)
