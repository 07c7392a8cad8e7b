"""What training and embedding share: number formats, precision, seeds."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssad_hpo.task import Precision, Training

# From this image size on a batch's activations are so large that glibc asks the kernel for each anew.
_LARGE_PIXELS = 128 * 128
# On CPUs with bf16 arithmetic autocast pays from this image size on (its casts cost more below).
_BFLOAT16_PIXELS = 64 * 64
# Values of ONEDNN_MAX_CPU_ISA without that arithmetic.
_WITHOUT_BFLOAT16 = {
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
}  # fmt: skip
DEFAULT_THREADS = 1  # several wait for each other wherever anything else computes: studies/contention.py


def resolve_precision(
    training: Training, device: torch.device, pixels: int, *, depthwise: bool = False
) -> Precision:
    """The precision that "auto" stands for, from the machine's capability, the image size and the network.

    Never from a timing: the same seed must give the same result on every run. On a CPU the capability is
    what oneDNN may use, so that ONEDNN_MAX_CPU_ISA stands for another machine here as well: without bf16
    instructions its bfloat16 takes four times as long as its float32.

    Args:
        training: whose `precision` is returned as it is unless it is "auto".
        device: where the training runs.
        pixels: of an image, height * width.
        depthwise: whether the network has depthwise convolutions, whose gradients oneDNN computes more slowly
            in bfloat16 than in float32.
    """
    if training.precision != "auto":
        return training.precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capable = torch.cpu.get_capabilities().get("avx512_bf16", False)
    capable = capable and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _WITHOUT_BFLOAT16
    return "bfloat16" if capable and pixels >= _BFLOAT16_PIXELS and not depthwise else "float32"


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
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("only these have been made to work")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for names and missing hardware
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: expected 'cpu' or a GPU that is there, got {str(device)!r} ({reason})"
        ) from error


def check_surroundings() -> None:
    """Raise ValueError, naming it, for a setting of torch's by which a training becomes another, or none."""
    found = {
        "a default dtype of float32": torch.get_default_dtype() == torch.float32,
        "a default device that computes": torch.get_default_device().type != "meta",
        "gradients switched on (no torch.no_grad or inference_mode around it)": torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled(),  # which `enable_grad` does not end
        "no torch.autocast around it (precision says the same)": not any(
            torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")
        ),
    }
    for expected, there in found.items():
        if not there:
            raise ValueError(f"torch: a training expects {expected}")


def autocast(device: torch.device, training: Training) -> torch.autocast:
    """The context in which the network runs at the training's (resolved) precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16")


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.float() / 255


def draw_batches(n: int, training: Training, generator: torch.Generator) -> Tensor:
    """(steps, batch_size) indices of images: one random order after the other, cut into batches."""
    needed = training.steps * training.batch_size
    orders = [torch.randperm(n, generator=generator, device=generator.device) for _ in range(-(-needed // n))]
    return torch.cat(orders)[:needed].view(training.steps, training.batch_size)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None, *, draws: bool = True) -> Iterator[None]:
    """Draws without a generator, such as initial weights and dropout, come from a seed's own inside.

    torch's global generators are neither read nor changed: they belong to the whole process, and what one
    thread draws from them changes what the next one gets. The draws are those that a global generator of
    this seed would give. On a GPU also with deterministic convolutions, so that the same seed trains the
    same detector.

    Args:
        seed: of the draws.
        device: where it is computed; None is the CPU.
        draws: whether there are any. To look at every operation costs a tenth of the small encoder's time.
    """
    with _deterministic_convolutions(device), _OwnDraws(seed) if draws else contextlib.nullcontext():
        yield


def seed_at(seed: int, step: int) -> int:
    """A seed for the draws at a training step, which those of no other seed near it has at any step."""
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63


# Overloads of torch's operations -> those of the same operations that take a generator.
_WITH_GENERATOR = {
    "default": "generator",
    "low": "low_generator",
    "low_dtype": "low_generator_dtype",
}


class _OwnDraws(TorchDispatchMode):
    """Hands every operation of this thread that draws and has no generator the one of a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_dropout.default:  # of GPUs
            return self._dropout(*args, **kwargs)
        arguments = {a.name: a.default_value for a in func._schema.arguments}
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        # Dropout in evaluation mode, which comes here whole where no gradient is recorded; attention's.
        if arguments.get("train") is False or arguments.get("dropout_p") == 0:
            return func(*args, **kwargs)
        if "generator" not in arguments:
            name = _WITH_GENERATOR.get(func._overloadname, "")
            if name not in func.overloadpacket.overloads():
                raise RuntimeError(
                    f"{func}: draws from torch's global generator; use one that takes a generator"
                )
            func = getattr(func.overloadpacket, name)
        device = arguments.get("device") or getattr(args[0], "device", None)
        return func(*args, **{**kwargs, "generator": self._generator(device)})

    def _generator(self, device: torch.device | None) -> torch.Generator:
        device = device or torch.get_default_device()
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _dropout(self, input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        """What torch does in one kernel: (output, mask)."""
        if train is False or p == 0:
            return input.clone(), torch.ones_like(input, dtype=torch.bool)
        drawn = torch.empty_like(input).bernoulli_(1 - p, generator=self._generator(input.device))
        mask = drawn.bool()
        return input * mask * (0 if p == 1 else 1 / (1 - p)), mask


@dataclass
class _Shared:
    """A setting of the whole process that several threads change for a time, under `_lock`.

    Attributes:
        users: how many are at it now.
        before: what it was when the first of them came.
    """

    users: int = 0
    before: Any = None


_lock = threading.Lock()
_deterministic, _threads = _Shared(), _Shared()
_of_this_thread = threading.local()


@contextlib.contextmanager
def _deterministic_convolutions(device: torch.device | None) -> Iterator[None]:
    """On a GPU cuDNN computes the same bits each time, until the last thread that needs it has left."""
    if device is None or device.type != "cuda":
        yield
        return
    with _lock:
        if not _deterministic.users:
            _deterministic.before = torch.backends.cudnn.deterministic
        _deterministic.users += 1
        torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        with _lock:
            _deterministic.users -= 1
            if not _deterministic.users:
                torch.backends.cudnn.deterministic = _deterministic.before


@contextlib.contextmanager
def threads(count: int = DEFAULT_THREADS) -> Iterator[None]:
    """Compute with so many processor threads inside, and with as many as before outside.

    torch's number belongs to the thread that sets it and to all that start later, so that studies in
    several threads of a process do not disturb each other.

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"threads: expected at least 1, got {count}")
    depth = getattr(_of_this_thread, "depth", 0)
    with _lock:
        if not _threads.users:
            _threads.before = torch.get_num_threads()
        # torch gives a thread its number when it is first asked for, and a later one of other threads'
        # would replace what is set here. One that starts while others are inside begins with theirs.
        before = torch.get_num_threads()
        before = before if depth else _threads.before
        _threads.users += 1
        torch.set_num_threads(count)
    _of_this_thread.depth = depth + 1
    try:
        yield
    finally:
        _of_this_thread.depth = depth
        with _lock:
            _threads.users -= 1
            torch.set_num_threads(before)
