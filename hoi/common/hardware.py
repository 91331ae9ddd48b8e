"""The machine: which devices it has, and two facts that decide how fast training and sampling run."""

import ctypes
import sys

import torch

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def check_device(device: str) -> None:
    """Raise ValueError unless the machine has the device: cpu, or with a GPU cuda or cuda:N."""
    if device != "cpu" and not (device.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device {device!r} is not there; expected cpu or, with a GPU, cuda or cuda:N")


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 is worth it on "cpu" or "cuda...": on a CPU without bf16 instructions it is several times slower."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it to the kernel after every operation.

    A step allocates the same large buffers again and again; mapping and clearing fresh pages each time took a third of
    a tiny U-Net's training step (20 against 13 pictures a second).  Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 256 * 2**20)
