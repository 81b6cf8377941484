"""A full memory is known by class or words; nothing else is one."""

from __future__ import annotations

import errno

import pytest
import torch

from trilens.errors import MemoryShortError
from trilens.io.short_memory import is_short_of_memory


def test_torchs_own_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 59, dtype=torch.float32)
    assert is_short_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"), False),
        (ValueError("out of memory, said a text"), False),
        (MemoryShortError("the model does not fit: out of memory"), False),  # said already
    ],
)
def test_what_is_one(error: Exception, is_one: bool) -> None:
    assert is_short_of_memory(error) is is_one
