"""How fast this device multiplies matrices of a network's shapes: a ceiling, and a reason to choose a precision."""

import time

import torch

from scmulan.model.transformer import MulanConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What bf16 has to gain before its rounding is worth it.
WORTH = 1.2


def gemm_rates(config: MulanConfig, device: torch.device | str = "cpu", *, rows: int = 512) -> dict[str, float]:
    """Operations per second of the linear layers of one block at each precision; a multiply-add is two.

    Parameters
    ----------
    config
        Shape of the network.
    device
        Where to multiply.
    rows
        Words of a batch.

    Returns
    -------
    dict
        ``fp32`` and ``bf16``; the best of three. Where bf16 is far slower (CPUs without its instructions), few rows
        stand for all.
    """
    W = config.width
    shapes = [(W, 3 * W), (W, W), (W, 4 * W), (4 * W, W)]
    rates = {"fp32": _rate(shapes, rows, torch.float32, device)}
    few = max(1, rows // 16)
    slow = _rate(shapes, few, torch.bfloat16, device, repeats=1)
    worth_a_look = slow > 0.25 * _rate(shapes, few, torch.float32, device, repeats=1)
    rates["bf16"] = _rate(shapes, rows, torch.bfloat16, device) if worth_a_look else slow
    return rates


def faster_precision(rates: dict[str, float]) -> str:
    """``"bf16"`` where it is clearly faster, else ``"fp32"``."""
    return "bf16" if rates["bf16"] > WORTH * rates["fp32"] else "fp32"


def _rate(
    shapes: list[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device | str, *, repeats: int = 3
) -> float:
    seconds = 0.0
    for inner, columns in shapes:
        a = torch.zeros(rows, inner, dtype=dtype, device=device)
        b = torch.zeros(columns, inner, dtype=dtype, device=device)
        best = float("inf")
        for again in range(repeats + 1):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            if a.is_cuda:
                torch.cuda.synchronize()
            # The first one also pays for whatever is made on first use.
            best = min(best, time.perf_counter() - start) if again else best
        seconds += best
    return 2.0 * rows * sum(inner * columns for inner, columns in shapes) / seconds
