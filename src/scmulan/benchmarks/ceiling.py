"""Ceilings of this machine: matrix products per data type, and bytes copied per second."""

import torch

from scmulan._machine import cpu
from scmulan.model.cost import DTYPES, best_seconds, gemm_seconds


def gemm_flops(rows: int, inner: int, columns: int, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Measure the operations per second of ``[rows, inner] @ [inner, columns]``; a multiply-add is two."""
    return 2.0 * rows * inner * columns / gemm_seconds(rows, inner, columns, dtype, repeats=repeats)


def copy_bandwidth(megabytes: int = 256, *, repeats: int = 5) -> float:
    """Measure the bytes per second read and written by a large copy."""
    source = torch.zeros(megabytes * 2**18)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), repeats=repeats)
    return 2.0 * source.numel() * 4 / seconds


def machine(*, quick: bool = False) -> dict[str, object]:
    """Describe CPU, cores, torch and measured ceilings: the ``machine`` of a benchmark's line.

    ``gemm_gflops`` holds the best of a few shapes per data type (the published model's feed-forward among them).
    """
    shapes = [(1024, 1120, 4480), (2048, 2048, 2048)]
    repeats = 2 if quick else 5
    gemm = {
        name: round(max(gemm_flops(*shape, dtype, repeats=repeats) for shape in shapes) / 1e9, 1)
        for name, dtype in DTYPES.items()
    }
    facts = cpu()
    return {
        "cpu": facts["model"],
        "flags": facts["flags"],
        "cores": facts["usable_cores"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gemm_gflops": gemm,
        "copy_gb_per_second": round(copy_bandwidth(64 if quick else 256, repeats=repeats) / 1e9, 1),
    }
