"""What a network of a given shape costs: parameters, bytes, floating-point operations. Arithmetic only, no torch.

A multiply-add counts as two operations. Matrix products and attention are counted; norms, activations, softmax and
look-ups, below two per cent of a word at any shape used here, are not.

How fast this device multiplies matrices of a network's shapes: a ceiling, and a reason to choose a precision.
"""

import time

import torch

from scmulan.model.network import MulanConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


def parameters(config: "MulanConfig") -> int:
    """Count the parameters of a network.

    Parameters
    ----------
    config
        Its shape.

    Returns
    -------
    int
        368,800,320 for the published shape.
    """
    W, V = config.width, config.vocabulary
    norm = W * (1 + config.bias)
    block = 12 * W * W + 2 * norm + 9 * W * config.bias
    total = config.layers * block + norm + 3 * V * W + (config.levels + 1) * W
    if config.set_state:
        total += (V + config.levels + 1) * W + W + (2 * W + 2) * W
    return total + 2 * V * config.value_spread + V * config.word_bias


def weight_bytes(config: "MulanConfig", precision: str = "fp32") -> int:
    """Count the bytes of all weights at a precision (``fp32``, ``bf16``, ``fp16``, ``int8``)."""
    return parameters(config) * BYTES[precision]


def kv_bytes_per_token(config: "MulanConfig", precision: str = "bf16") -> int:
    """Count the bytes that one word takes in the cache: a key and a value of each layer."""
    return 2 * config.layers * config.width * BYTES[precision]


def forward_flops_per_token(config: "MulanConfig", *, context: float = 0, heads: bool = True) -> float:
    """Operations of reading one more word.

    Parameters
    ----------
    config
        Shape of the network.
    context
        Words that it attends to, itself included; 0 leaves attention's share out.
    heads
        Whether both heads are evaluated there.
    """
    W = config.width
    body = config.layers * (24 * W * W + 4 * W * context)
    if config.set_state:
        body += 2 * W * (2 * W + 2)
    return body + heads * 4 * W * config.vocabulary


def training_flops_per_token(config: "MulanConfig", *, context: float = 0, heads: bool = True) -> float:
    """Operations of forward and backward for one word: three times forward, nothing recomputed."""
    return 3 * forward_flops_per_token(config, context=context, heads=heads)


def sentence_flops(config: "MulanConfig", words: int, *, heads_at: int = 1) -> float:
    """Operations of one forward pass over a sentence under causal attention.

    Parameters
    ----------
    config
        Shape of the network.
    words
        Words of the sentence; word ``t`` attends to ``t`` words, so the average context is ``(words + 1) / 2``.
    heads_at
        At how many positions both heads are evaluated: one for annotation, every target in training.
    """
    body = words * forward_flops_per_token(config, context=(words + 1) / 2, heads=False)
    return body + heads_at * 4 * config.width * config.vocabulary


def batch_flops(config: "MulanConfig", words: int, sentences: int, positions: int) -> float:
    """Operations of forward and backward over a training batch: three times forward, nothing recomputed.

    Parameters
    ----------
    config
        Shape of the network.
    words
        Words of all sentences together, padding left out.
    sentences
        Number of sentences, taken to be about equally long.
    positions
        Positions at which both heads are evaluated.
    """
    context = (words / max(1, sentences) + 1) / 2
    body = words * forward_flops_per_token(config, context=context, heads=False)
    return 3 * (body + positions * 4 * config.width * config.vocabulary)


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
