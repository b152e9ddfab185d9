"""The CUDA driver through ctypes: a device, its memory and one stream, and nothing to install.

Whoever has an NVIDIA GPU has ``libcuda.so.1``; neither the CUDA toolkit nor another Python package
is needed.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from llmopt.errors import BackendUnavailableError, LlmoptError
from llmopt.interface.arrays import Array

LIBRARY: Final = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class Driver:
    """One GPU, opened through the CUDA driver.

    Args:
        backend: Name of the backend, for messages.
        ordinal: Number of the GPU.

    Raises:
        BackendUnavailableError: There is no driver, or no GPU.
    """

    def __init__(self, backend: str, ordinal: int = 0) -> None:
        self._library = _load(backend)
        try:
            self._call("cuInit", 0)
            self._device = ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(self._device), ordinal)
        except LlmoptError as error:
            problem = f"the NVIDIA driver is here but gives no GPU ({error}); see `nvidia-smi`"
            raise BackendUnavailableError(backend, problem) from error
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self._stream), 0)

    @property
    def name(self) -> str:
        """The GPU's name."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    @property
    def version(self) -> int:
        """The newest CUDA that the driver serves: 13010 for 13.1."""
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return number.value

    @property
    def capability(self) -> str:
        """The compute capability: ``"8.9"``."""
        numbers = []
        for attribute in (_MAJOR, _MINOR):
            number = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(number), attribute, self._device)
            numbers.append(str(number.value))
        return ".".join(numbers)

    @property
    def stream(self) -> int:
        """The stream that all work goes to."""
        return int(self._stream.value or 0)

    def allocate(self, shape: Sequence[int], item_bytes: int = 1) -> Memory:
        """Return memory of the device for an array of this shape, set to zero."""
        pointer = ctypes.c_uint64()
        size = max(math.prod(shape) * item_bytes, 1)
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        self._call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        return Memory(self, pointer.value, size, tuple(shape))

    def release(self, pointer: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def upload(self, pointer: int, array: Array) -> None:
        """Copy an array to the device."""
        held = np.ascontiguousarray(array)
        address = ctypes.c_void_p(held.ctypes.data)
        size = ctypes.c_size_t(held.nbytes)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), address, size)

    def download(self, pointer: int, shape: Sequence[int], dtype: str) -> Array:
        """Return a copy of what is on the device, after all work before it."""
        array = np.empty(tuple(shape), dtype)
        self.wait()
        address = ctypes.c_void_p(array.ctypes.data)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoH_v2", address, ctypes.c_uint64(pointer), size)
        return array

    def wait(self) -> None:
        """Return when all work is done."""
        self._call("cuStreamSynchronize", self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise LlmoptError(f"CUDA: {name} failed with {self._error(code)}")

    def _error(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return text.value.decode() if text.value else f"error {code}"


class Memory:
    """Memory of the device, given back when nothing holds it any more.

    Args:
        driver: Driver that allocated it.
        pointer: Address on the device.
        size_bytes: Length of the allocation.
        shape: Shape of the array in it.
    """

    def __init__(
        self, driver: Driver, pointer: int, size_bytes: int, shape: tuple[int, ...]
    ) -> None:
        self._driver = driver
        self.pointer = pointer
        self.size_bytes = size_bytes
        self.shape = shape

    def __del__(self) -> None:
        """Give it back."""
        self._driver.release(self.pointer)


def _load(backend: str) -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        problem = (
            f"no NVIDIA driver: {LIBRARY} cannot be loaded; run this artifact on a machine with an "
            "NVIDIA GPU and its driver, or compile for another target"
        )
        raise BackendUnavailableError(backend, problem) from error
