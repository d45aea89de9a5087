"""What a network of a given shape costs: parameters, bytes, floating-point operations. Arithmetic only, no torch.

A multiply-add counts as two operations. Matrix products and attention are counted; norms, activations, softmax and
look-ups, below two per cent of a word at any shape used here, are not.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scmulan.model.transformer import MulanConfig

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


def kv_bytes_per_word(config: "MulanConfig", precision: str = "bf16") -> int:
    """Count the bytes that one word takes in the cache: a key and a value of each layer."""
    return 2 * config.layers * config.width * BYTES[precision]


def forward_flops_per_word(config: "MulanConfig", *, context: float = 0, heads: bool = True) -> float:
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


def training_flops_per_word(config: "MulanConfig", *, context: float = 0, heads: bool = True) -> float:
    """Operations of forward and backward for one word: three times forward, nothing recomputed."""
    return 3 * forward_flops_per_word(config, context=context, heads=heads)


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
    body = words * forward_flops_per_word(config, context=(words + 1) / 2, heads=False)
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
    body = words * forward_flops_per_word(config, context=context, heads=False)
    return 3 * (body + positions * 4 * config.width * config.vocabulary)
