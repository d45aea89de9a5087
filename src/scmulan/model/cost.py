"""Cost of a network of a given shape: parameters, bytes, operations; and how fast a device multiplies its matrices.

A multiply-add counts as two operations. Matrix products and attention are counted; norms, activations, softmax and
look-ups, below two per cent of a token at any shape used here, are not.
"""

import time
from collections.abc import Callable

import torch

from scmulan.model.network import MulanConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


def count_parameters(config: MulanConfig) -> int:
    """Count the parameters of a network: 368,800,320 for the published shape."""
    W, V = config.width, config.vocabulary
    norm = W * (1 + config.bias)
    block = 12 * W * W + 2 * norm + 9 * W * config.bias
    total = config.layers * block + norm + 3 * V * W + (config.levels + 1) * W
    if config.set_state:
        total += (V + config.levels + 1) * W + W + (2 * W + 2) * W
    return total + 2 * V * config.value_spread + V * config.word_bias


def weight_bytes(config: MulanConfig, precision: str = "fp32") -> int:
    """Count the bytes of all weights at a precision (``fp32``, ``bf16``, ``fp16``, ``int8``)."""
    return count_parameters(config) * BYTES[precision]


def kv_bytes_per_token(config: MulanConfig, precision: str = "bf16") -> int:
    """Count the bytes that one token takes in the key-value cache: a key and a value of each layer."""
    return 2 * config.layers * config.width * BYTES[precision]


def forward_flops_per_token(config: MulanConfig, *, context: float = 0, heads: bool = True) -> float:
    """Count the operations of reading one more token.

    Parameters
    ----------
    config
        Shape of the network.
    context
        Number of tokens that it attends to, itself included; 0 leaves attention out.
    heads
        Whether both heads are evaluated there.
    """
    W = config.width
    body = config.layers * (24 * W * W + 4 * W * context)
    if config.set_state:
        body += 2 * W * (2 * W + 2)
    return body + heads * 4 * W * config.vocabulary


def sentence_flops(config: MulanConfig, n_tokens: int, *, heads_at: int = 1) -> float:
    """Count the operations of one forward pass over a sentence under causal attention.

    Parameters
    ----------
    config
        Shape of the network.
    n_tokens
        Length of the sentence; token ``t`` attends to ``t`` tokens, so the average context is ``(n_tokens + 1) / 2``.
    heads_at
        Number of positions at which both heads are evaluated: one for annotation, every target in training.
    """
    body = n_tokens * forward_flops_per_token(config, context=(n_tokens + 1) / 2, heads=False)
    return body + heads_at * 4 * config.width * config.vocabulary


def batch_flops(config: MulanConfig, n_tokens: int, n_sentences: int, n_positions: int) -> float:
    """Count the operations of forward and backward over a training batch: three times forward, nothing recomputed.

    Parameters
    ----------
    config
        Shape of the network.
    n_tokens
        Tokens of all sentences together, padding left out.
    n_sentences
        Number of sentences, taken to be about equally long.
    n_positions
        Positions at which both heads are evaluated.
    """
    context = (n_tokens / max(1, n_sentences) + 1) / 2
    body = n_tokens * forward_flops_per_token(config, context=context, heads=False)
    return 3 * (body + n_positions * 4 * config.width * config.vocabulary)


# -- measured rates ------------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Speed of bf16 relative to fp32 from which on its rounding is worth it in training.
MIN_BF16_SPEEDUP = 1.2
# A dtype below this fraction of fp32's rate on few rows (a CPU without its instructions) is not timed on all.
MIN_TRIAL_RATE = 0.25


def best_seconds(work: Callable[[], object], *, device: torch.device | str = "cpu", repeats: int = 5) -> float:
    """Return the seconds of the fastest of some runs, after one that pays for whatever is made on first use."""
    kind = torch.device(device).type
    best = float("inf")
    for run in range(repeats + 1):
        start = time.perf_counter()
        work()
        if kind != "cpu":
            getattr(torch, kind).synchronize()
        best = min(best, time.perf_counter() - start) if run else best
    return best


def gemm_seconds(
    rows: int,
    inner: int,
    columns: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    repeats: int = 5,
) -> float:
    """Measure a linear layer of ``[rows, inner]`` to ``[rows, columns]``: ``2 rows inner columns`` operations."""
    generator = torch.Generator().manual_seed(0)  # torch's own numbers are those of the training run
    a = torch.randn(rows, inner, generator=generator).to(device, dtype)
    b = torch.randn(columns, inner, generator=generator).to(device, dtype)
    return best_seconds(lambda: torch.nn.functional.linear(a, b), device=device, repeats=repeats)


def gemm_rates(config: MulanConfig, device: torch.device | str = "cpu", *, rows: int = 512) -> dict[str, float]:
    """Measure the operations per second of the linear layers of one block, in fp32 and bf16.

    Parameters
    ----------
    config
        Shape of the network.
    device
        Where to multiply.
    rows
        Tokens of a batch.

    Returns
    -------
    dict
        ``fp32`` and ``bf16``; each layer the best of three. Where bf16 is far slower (CPUs without its instructions),
        it is measured on few rows only.
    """
    W = config.width
    layers = [(W, 3 * W), (W, W), (W, 4 * W), (4 * W, W)]

    def rate(n: int, dtype: torch.dtype, repeats: int = 3) -> float:
        seconds = sum(gemm_seconds(n, *layer, dtype, device=device, repeats=repeats) for layer in layers)
        return 2.0 * n * sum(inner * columns for inner, columns in layers) / seconds

    few = max(1, rows // 16)
    bf16 = rate(few, torch.bfloat16, repeats=1)
    if bf16 > MIN_TRIAL_RATE * rate(few, torch.float32, repeats=1):
        bf16 = rate(rows, torch.bfloat16)
    return {"fp32": rate(rows, torch.float32), "bf16": bf16}


def faster_precision(rates: dict[str, float]) -> str:
    """Return ``"bf16"`` where it is clearly faster, else ``"fp32"``."""
    return "bf16" if rates["bf16"] > MIN_BF16_SPEEDUP * rates["fp32"] else "fp32"
