"""Selects the precision of the examples, and attention kernels that are safe in it."""

from __future__ import annotations

import torch


def has_fast_bfloat16() -> bool:
    """Return whether the device multiplies natively in bfloat16. If emulated, float32 is as fast or faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available() or not torch.backends.mkldnn.is_available():
        return False
    # `get_capabilities` is public since torch 2.11; older versions count as not having the capability.
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "bf16"))  # x86 (all with AMX), ARM


def avoid_cudnn_attention() -> None:
    """Turn off cuDNN's attention kernels, without effect on other devices than CUDA.

    In bfloat16, with padded rows, gradients became NaN or the kernels failed (torch 2.11, H200).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
