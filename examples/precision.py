"""Which precision is fast where an example runs."""

from __future__ import annotations

import torch


def has_fast_bfloat16() -> bool:
    """Whether the device multiplies in bfloat16 itself. Where torch emulates it, float32 is as fast or faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available() or not torch.backends.mkldnn.is_available():
        return False
    # `get_capabilities` is public since torch 2.11; older ones have private functions only, and count as without.
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "bf16"))  # x86 (all with AMX), ARM
