"""The decoder: words in, hidden states out; two heads turn a hidden state into what comes next.

The published network is a pre-norm GPT without positional encoding: word embedding plus value embedding, causal
attention, tanh-GELU, an entity head (which word) and a value head (which bin it would have), neither tied. Our own
models may add two things, both off in the published shape: a *set state* at the input, which shows every
position a summary of the words so far (an ordinary linear classifier sees all genes of a cell at once; so does this),
and a *spread* for each word's value, so that values can be sampled.

Shape letters: B sentences, T words, W width, V vocabulary.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmulan.errors import ModelError
from scmulan.model.cpu_attention.attention import causal_attention
from scmulan.model.cpu_attention.kernels import TILE
from scmulan.model.cpu_attention.kv_cache import CpuKVCache
from scmulan.model.kv_cache import KVCache


@dataclass(kw_only=True, slots=True)
class MulanConfig:
    """Shape of the network."""

    vocabulary: int = 2222
    """Number of words."""
    layers: int = 24
    """Decoder blocks."""
    heads: int = 20
    """Attention heads; must divide ``width``."""
    width: int = 1120
    """Size of a hidden state."""
    levels: int = 10
    """Bins of a gene's value; value 0 is kept for words that are no genes."""
    bias: bool = False
    """Whether linear layers and norms have biases (the 368 M release has none)."""
    set_state: bool = False
    """Whether a summary of the words so far is added to the input of each position."""
    value_spread: bool = False
    """Whether each word has a learned scale, which makes its value a distribution over the bins."""
    word_bias: bool = False
    """Whether each word has a bias in the entity head."""
    bounded_genes: bool = False
    """Whether a gene competes to be the next word with weight σ(logit), at most one (see ``Mulan.log_weights``)."""
    dropout: float = 0.0
    """Dropout of the residual branches while training."""

    def __post_init__(self) -> None:
        for name, least in (("vocabulary", 1), ("layers", 1), ("heads", 1), ("width", 1), ("levels", 2)):
            if getattr(self, name) < least:
                raise ModelError(f"model {name} is {getattr(self, name)}: expected at least {least}")
        if self.width % self.heads:
            raise ModelError(f"model width {self.width} is not a multiple of its {self.heads} heads")

    def to_json(self) -> dict[str, Any]:
        """Contents as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Configuration from parsed JSON; unknown keys are refused."""
        unknown = set(raw) - {f.name for f in fields(cls)}
        if unknown:
            raise ModelError(f"unknown model setting {sorted(unknown)[0]!r}: this scmulan may be older than the model")
        return cls(**raw)


PUBLISHED = MulanConfig()
# Genes after which a cell's own genes count for half of what many genes would.
FEW_GENES = 32


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: MulanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTW: Tensor, cache: KVCache | None, layer: int, mask: Tensor | None) -> Tensor:
        """Attend to the words so far; with a cache, to those of earlier calls too."""
        B, T, W = x_BTW.shape
        qkv = self.qkv(x_BTW).view(B, T, 3, self.heads, W // self.heads)
        if cache is not None:
            return self.out(cache.attend(layer, qkv, mask))
        if T >= TILE and qkv.device.type == "cpu" and qkv.dtype == torch.float32 and not torch.is_grad_enabled():
            return self.out(causal_attention(qkv))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, W))

    def last(self, x_BTW: Tensor, at: Tensor) -> Tensor:
        """Attend from one position of each row, ``at`` (int64 ``[B]``), to the words up to it: ``[B, W]``."""
        B, T, W = x_BTW.shape
        q = _columns(self.qkv, x_BTW[torch.arange(B, device=at.device), at], 0, W).view(B, self.heads, 1, -1)
        keys, values = _columns(self.qkv, x_BTW, W, 3 * W).split(W, dim=2)
        k, v = (t.view(B, T, self.heads, W // self.heads).transpose(1, 2) for t in (keys, values))
        mask = (torch.arange(T, device=at.device) <= at[:, None])[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, W))


def _columns(layer: nn.Module, x: Tensor, start: int, end: int) -> Tensor:
    """Some outputs of a linear layer; one that keeps its weights in a form of its own computes all of them."""
    if not isinstance(layer, nn.Linear):
        return layer(x)[..., start:end]
    bias = None if layer.bias is None else layer.bias[start:end]
    return F.linear(x.to(layer.weight.dtype), layer.weight[start:end], bias)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, config: MulanConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.width, bias=config.bias)
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int, mask: Tensor | None) -> Tensor:
        """``[B, T, W]`` → ``[B, T, W]``."""
        x = x + self.dropout(self.attention(self.norm_1(x), cache, layer, mask))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh")))

    def last(self, x: Tensor, at: Tensor) -> Tensor:
        """``[B, T, W]`` → ``[B, W]``: the output at one position of each row, without computing the others."""
        y = x[torch.arange(len(at), device=at.device), at] + self.attention.last(self.norm_1(x), at)
        return y + self.down(F.gelu(self.up(self.norm_2(y)), approximate="tanh"))


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Embedding that is not filled where it has no memory: torch would import its compiler for that, for a second."""
    weight = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else None)


class SetState(nn.Module):
    """Summary of the words so far: what the genes say, what the other words say, and how many genes there are.

    Genes are summed as word vector × gain of its value: the product of gene and level is what a linear model of
    expression uses, and what a sum of the two embeddings lacks. The sum is normalised and counts for n / (n + 32) with
    n genes: a single gene says little. Metadata and prompt words have a sum of their own, which a thousand genes do
    not drown. The count is what a stop decision needs and attention, being an average, cannot tell.
    """

    def __init__(self, config: MulanConfig) -> None:
        super().__init__()
        self.word = _embedding(config.vocabulary, config.width)
        self.gain = _embedding(config.levels + 1, config.width)
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.out = nn.Linear(2 * config.width + 2, config.width, bias=False)

    def forward(self, entity: Tensor, value: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """State ``[B, T, W]`` at each word, and the running sums ``[B, T, 2 W + 1]`` that a cache keeps."""
        # Sums and counts of a thousand words need float32: bfloat16 counts no further than 256.
        is_gene = (value > 0)[..., None].float()
        word, gain = self.word(entity).float(), self.gain(value).float()
        bag = torch.cat((word * gain * is_gene, word * (1 - is_gene), is_gene), dim=-1).cumsum(1)
        if cache is not None:
            assert cache.bag is not None
            bag = bag + cache.bag[:, None]
        genes, rest, count = bag.split((word.shape[-1], word.shape[-1], 1), dim=-1)
        number = torch.cat(((count + 1).log() - 4.0, count / 512.0), dim=-1)
        kind = self.out.weight.dtype
        genes = self.norm((genes / (count + 1).sqrt()).to(kind)) * (count / (count + FEW_GENES)).to(kind)
        return self.out(torch.cat((genes, rest.to(kind), number.to(kind)), dim=-1)), bag


class Mulan(nn.Module):
    """The decoder with its two heads.

    Parameters
    ----------
    config
        Shape of the network.
    """

    def __init__(self, config: MulanConfig) -> None:
        super().__init__()
        self.config = config
        self.precision = "fp32"
        """How the products of the blocks are computed, see :mod:`scmulan.infer.precision`."""
        self.word = _embedding(config.vocabulary, config.width)
        self.level = _embedding(config.levels + 1, config.width)
        self.set_state = SetState(config) if config.set_state else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.entity_head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.value_head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.entity_bias = nn.Parameter(torch.zeros(config.vocabulary)) if config.word_bias else None
        self.log_scale = nn.Parameter(torch.zeros(config.vocabulary)) if config.value_spread else None
        self.value_bias = nn.Parameter(torch.full((config.vocabulary,), 5.0)) if config.value_spread else None

    def initialise(self, seed: int) -> Self:
        """GPT-2 initialisation from a seed: normal 0.02, residual outputs scaled by the depth."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight") or (".norm_" in name and name.endswith("weight")):
                nn.init.ones_(parameter)
            elif name == "value_bias":
                continue  # starts at the middle bin
            elif name.endswith("bias") or name == "log_scale":
                nn.init.zeros_(parameter)
            elif name == "set_state.gain.weight":
                with torch.no_grad():
                    steps = torch.linspace(0.1, 1.0, self.config.levels + 1)
                    parameter.copy_(steps[:, None].expand_as(parameter))
            else:
                residual = name.endswith(("attention.out.weight", "down.weight"))
                std = 0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02
                nn.init.normal_(parameter, 0.0, std, generator=generator)
        return self

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(self, entity: Tensor, value: Tensor, cache: KVCache | None = None, new: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm.

        Parameters
        ----------
        entity, value
            int64 ``[B, T]``, right-padded with anything: causal attention never looks right.
        cache
            Words read before; the new ones are added to it.
        new
            int64 ``[B]``: how many of the T words of each row are no padding; needed with a cache (default: all).

        Returns
        -------
        Tensor
            ``[B, T, W]``.
        """
        x = self.word(entity) + self.level(value)
        bag = None
        if self.set_state is not None:
            state, bag = self.set_state(entity, value, cache)
            x = x + state
        mask = None if cache is None else cache.mask(entity.shape[1])
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer, mask)
        if cache is not None:
            cache.advance(entity.shape[1], new, bag)
        return self.norm(x)

    def last(self, entity: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        """Hidden state at the last word of each row, as :meth:`forward` would give it there, for less work.

        The last block and the norm run at that position only; every other position just gives a key and a value.

        Parameters
        ----------
        entity, value
            int64 ``[B, T]``, right-padded with anything.
        lengths
            int64 ``[B]``: words of each row, at least one.

        Returns
        -------
        Tensor
            ``[B, W]``.
        """
        x = self.word(entity) + self.level(value)
        if self.set_state is not None:
            x = x + self.set_state(entity, value, None)[0]
        *body, top = self.blocks
        for layer, block in enumerate(body):
            x = block(x, None, layer, None)
        assert isinstance(top, Block)
        return self.norm(top.last(x, lengths - 1))

    def entity_logits(self, hidden: Tensor) -> Tensor:
        """Logit of every word at hidden states ``[..., W]`` → ``[..., V]``."""
        logits = self.entity_head(hidden)
        return logits if self.entity_bias is None else logits + self.entity_bias

    def log_weights(self, logits: Tensor, end: int) -> Tensor:
        """Log of the weight with which each word of a cell competes to be the next one: ``[..., V]`` → ``[..., V]``.

        All genes that a cell surely has are equally likely to come next, and as the cell goes on the odds that a gene
        is still to come fall by the same factor for all genes. With weight σ(z) the first is saturation and the
        second one common shift of z; softmax, whose weight is exp(z), can say neither. The end word keeps exp(z).
        """
        if not self.config.bounded_genes:
            return logits
        bounded = F.logsigmoid(logits)
        bounded[..., end] = logits[..., end]
        return bounded

    def value_mean(self, hidden: Tensor) -> Tensor:
        """Expected bin of every word, were it said next: ``[..., W]`` → ``[..., V]``."""
        mean = self.value_head(hidden)
        return mean if self.value_bias is None else mean + self.value_bias

    def value_mean_of(self, hidden: Tensor, word: Tensor) -> Tensor:
        """Expected bin of one word at each hidden state: ``[..., W]`` and int64 ``[...]`` (or 1) → ``[...]``."""
        mean = (self.value_head.weight[word] * hidden).sum(-1)
        return mean if self.value_bias is None else mean + self.value_bias[word]

    def level_log_probs(self, mean: Tensor, word: Tensor) -> Tensor:
        """Log-probability of each bin 1…levels of given words.

        A logistic distribution around the mean with the word's own scale, cut into bins of width one; the outer bins
        hold the tails.

        Parameters
        ----------
        mean
            Expected bins ``[...]`` (from :meth:`value_mean`).
        word
            Word ids ``[...]``.

        Returns
        -------
        Tensor
            ``[..., levels]``; rows sum to one after ``exp``.
        """
        assert self.log_scale is not None
        edges = torch.arange(1, self.config.levels, device=mean.device, dtype=mean.dtype) + 0.5
        scale = self.log_scale[word].exp()[..., None]
        below = (edges - mean[..., None]) / scale  # upper edge of bins 1 … levels − 1
        # log(sigmoid(b) − sigmoid(a)) = logsigmoid(b) + logsigmoid(−a) + log(1 − exp(a − b)), stable in both tails
        inner = F.logsigmoid(below[..., 1:]) + F.logsigmoid(-below[..., :-1]) + torch.log(-torch.expm1(-1 / scale))
        return torch.cat((F.logsigmoid(below[..., :1]), inner, F.logsigmoid(-below[..., -1:])), dim=-1)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Empty cache for ``rows`` sentences of up to ``capacity`` words."""
        c = self.config
        weight = self.word.weight
        bag = torch.zeros(rows, 2 * c.width + 1, device=weight.device) if self.set_state is not None else None
        like = weight.new_empty(0, dtype=torch.bfloat16 if self.precision == "bf16" else weight.dtype)
        kind = CpuKVCache if like.device.type == "cpu" and like.dtype == torch.float32 else KVCache
        return kind.empty(c.layers, rows, c.heads, capacity, c.width // c.heads, bag=bag, like=like)
