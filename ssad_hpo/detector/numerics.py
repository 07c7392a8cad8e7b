"""What training and embedding share: number formats, precision, seeds."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ssad_hpo.task import Precision, Training

# From this image size on a batch's activations are so large that glibc asks the kernel for each anew.
_LARGE_PIXELS = 128 * 128
# On CPUs with bf16 arithmetic autocast pays from this image size on (its casts cost more below).
_BFLOAT16_PIXELS = 64 * 64


def resolve_precision(training: Training, device: torch.device, pixels: int) -> Precision:
    """The precision that "auto" stands for, from the machine's capability and the image size alone.

    Never from a timing: the same seed must give the same result on every run.

    Args:
        training: whose `precision` is returned as it is unless it is "auto".
        device: where the training runs.
        pixels: of an image, height * width.
    """
    if training.precision != "auto":
        return training.precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capable = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bfloat16" if capable and pixels >= _BFLOAT16_PIXELS else "float32"


def prepare_allocator(device: torch.device, pixels: int) -> None:
    """Let this process keep the memory that large CPU tensors free, for the next step to use again.

    glibc maps every block above 32 MiB anew and gives it back when it is freed, so that each training
    step pays for clearing its pages again: a third of the time at 256 pixels. The price is that the
    process holds its peak until it ends. Done once a process, for large images on a CPU under glibc
    alone, and not where the user has set malloc's options (MALLOC_MMAP_MAX_, GLIBC_TUNABLES).
    """
    if device.type == "cpu" and pixels >= _LARGE_PIXELS and sys.platform == "linux":
        _keep_freed_memory()


@functools.cache
def _keep_freed_memory() -> None:
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def check_device(device: str | torch.device) -> None:
    """Raise ValueError, naming the device, if it is none that torch knows or none that is there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for names and missing hardware
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: expected 'cpu' or a GPU that is there, got {str(device)!r} ({reason})"
        ) from error


def autocast(device: torch.device, training: Training) -> torch.autocast:
    """The context in which the network runs at the training's (resolved) precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16")


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.float() / 255


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """torch's global generators set to a seed inside, and left as they were outside.

    On a GPU also with deterministic convolutions, so that the same seed trains the same detector.
    """
    on_gpu = device is not None and device.type == "cuda"
    as_it_was = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = as_it_was or on_gpu
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            torch.manual_seed(seed)
            yield
    finally:
        torch.backends.cudnn.deterministic = as_it_was
