"""Which precision a device multiplies fast. Apart from `train`, so that who only answers questions loads no trainer."""

from pathlib import Path

import torch

from llava_bridge.config import Precision


def resolve_precision(precision: Precision) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it: elsewhere it is emulated, far slower than float32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else _cpu_multiplies_bfloat16()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
