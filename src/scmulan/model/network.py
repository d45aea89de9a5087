"""The network: tokens in, hidden states out; two heads turn a hidden state into the next token and its value.

The published network is a pre-norm GPT without positional encoding: token embedding plus value embedding, causal
attention, tanh-GELU, an entity head (logits of the next token) and a value head (the bin that each token would have),
neither tied. Our own models may add, all off in the published shape: a *set state* at the input, which shows every
position a summary of the tokens so far (an ordinary linear classifier sees all genes of a cell at once; so does this);
a *value spread* for each token, so that values can be sampled; a bias in the entity head; and *bounded* gene weights.

Shape letters: B rows (sentences), T tokens, W width, V vocabulary. A token is an entity (its id) with a value (the bin
of a gene's expression, 0 for any other token). Names of modules and parameters are those of ``model.safetensors``.
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
    """Shape of a network; the defaults are the published one (368,800,320 parameters)."""

    vocabulary: int = 2222
    """Number of tokens."""
    layers: int = 24
    """Number of blocks."""
    heads: int = 20
    """Attention heads of each block; must divide ``width``."""
    width: int = 1120
    """Size of a hidden state."""
    levels: int = 10
    """Bins of a gene's value, counted from 1; value 0 is that of tokens that are no genes."""
    bias: bool = False
    """Whether linear layers and norms of the blocks have biases (the published 368 M model has none)."""
    set_state: bool = False
    """Whether a summary of the tokens so far is added to each position's input (:class:`SetState`)."""
    value_spread: bool = False
    """Whether each token has a learned scale, which makes its value a distribution over the bins."""
    word_bias: bool = False
    """Whether each token has a bias in the entity head."""
    bounded_genes: bool = False
    """Whether a gene competes to come next with weight σ(logit), at most 1 (:meth:`Mulan.log_weights`)."""
    dropout: float = 0.0
    """Dropout probability of the residual branches in training."""

    def __post_init__(self) -> None:
        for name, minimum in (("vocabulary", 1), ("layers", 1), ("heads", 1), ("width", 1), ("levels", 2)):
            if getattr(self, name) < minimum:
                raise ModelError(f"model {name} is {getattr(self, name)}: expected at least {minimum}")
        if self.width % self.heads:
            raise ModelError(f"model width {self.width} is not a multiple of its {self.heads} heads")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Return the configuration in parsed JSON; refuse unknown keys with a :class:`ModelError`."""
        unknown = set(raw) - {f.name for f in fields(cls)}
        if unknown:
            raise ModelError(f"unknown model setting {sorted(unknown)[0]!r}: this scmulan may be older than the model")
        return cls(**raw)


PUBLISHED = MulanConfig()
# Number of genes at which the genes' part of the set state has half of its full weight.
HALF_WEIGHT_GENES = 32


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding, not filled on the meta device: torch would import its compiler for that, for a second."""
    weight = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else None)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, config: MulanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTW: Tensor, cache: KVCache | None, layer: int, mask: Tensor | None) -> Tensor:
        """Attend, ``[B, T, W]`` → ``[B, T, W]``; with a cache, to tokens of earlier calls as well."""
        B, T, W = x_BTW.shape
        qkv = self.qkv(x_BTW).view(B, T, 3, self.heads, W // self.heads)
        if cache is not None:
            return self.out(cache.attend(layer, qkv, mask))
        if T >= TILE and qkv.device.type == "cpu" and qkv.dtype == torch.float32 and not torch.is_grad_enabled():
            return self.out(causal_attention(qkv))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, W))

    def forward_at(self, x_BTW: Tensor, index_B: Tensor) -> Tensor:
        """Attend from one position of each row only, ``[B, T, W]`` → ``[B, W]``."""
        B, T, W = x_BTW.shape
        x_BW = x_BTW[torch.arange(B, device=index_B.device), index_B]
        q = _some_outputs(self.qkv, x_BW, 0, W).view(B, self.heads, 1, -1)
        k_BTW, v_BTW = _some_outputs(self.qkv, x_BTW, W, 3 * W).split(W, dim=2)
        k, v = (t.view(B, T, self.heads, W // self.heads).transpose(1, 2) for t in (k_BTW, v_BTW))
        mask = (torch.arange(T, device=index_B.device) <= index_B[:, None])[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, W))


def _some_outputs(layer: nn.Module, x: Tensor, start: int, end: int) -> Tensor:
    """Return outputs ``start`` to ``end`` of a linear layer; one with packed weights has to compute all of them."""
    if not isinstance(layer, nn.Linear):
        return layer(x)[..., start:end]
    bias = None if layer.bias is None else layer.bias[start:end]
    return F.linear(x.to(layer.weight.dtype), layer.weight[start:end], bias)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: MulanConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.LayerNorm(config.width, bias=config.bias)
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTW: Tensor, cache: KVCache | None, layer: int, mask: Tensor | None) -> Tensor:
        """Apply the block, ``[B, T, W]`` → ``[B, T, W]``."""
        x_BTW = x_BTW + self.dropout(self.attention(self.norm_1(x_BTW), cache, layer, mask))
        return x_BTW + self.dropout(self._feed_forward(self.norm_2(x_BTW)))

    def forward_at(self, x_BTW: Tensor, index_B: Tensor) -> Tensor:
        """Compute the output at one position of each row only, ``[B, T, W]`` → ``[B, W]``."""
        rows = torch.arange(len(index_B), device=index_B.device)
        x_BW = x_BTW[rows, index_B] + self.attention.forward_at(self.norm_1(x_BTW), index_B)
        return x_BW + self._feed_forward(self.norm_2(x_BW))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SetState(nn.Module):
    """Summary of the tokens so far: sum of the genes, sum of the other tokens, and number of genes.

    Notes
    -----
    Genes are summed as token vector × gain of its value: the product of gene and level is what a linear model of
    expression uses, and what a sum of the two embeddings lacks. The sum is normalised and weighted by n / (n + 32) with
    n genes: a single gene says little. Metadata and prompt tokens have a sum of their own, which a thousand genes do
    not drown. A stop decision needs the number of genes, which attention, being an average, cannot tell.
    """

    def __init__(self, config: MulanConfig) -> None:
        super().__init__()
        self.word = _embedding(config.vocabulary, config.width)
        self.gain = _embedding(config.levels + 1, config.width)
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.out = nn.Linear(2 * config.width + 2, config.width, bias=False)

    def forward(self, entity: Tensor, value: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Return the set state ``[B, T, W]`` at each token, and the running sums ``[B, T, 2 W + 1]`` behind it."""
        # Sums and counts of a thousand tokens need float32: bfloat16 counts no further than 256.
        is_gene = (value > 0)[..., None].float()
        token, gain = self.word(entity).float(), self.gain(value).float()
        sums = torch.cat((token * gain * is_gene, token * (1 - is_gene), is_gene), dim=-1).cumsum(1)
        if cache is not None:
            assert cache.set_sums is not None
            sums = sums + cache.set_sums[:, None]
        genes, others, n_genes = sums.split((token.shape[-1], token.shape[-1], 1), dim=-1)
        size = torch.cat(((n_genes + 1).log() - 4.0, n_genes / 512.0), dim=-1)
        dtype = self.out.weight.dtype
        weight = (n_genes / (n_genes + HALF_WEIGHT_GENES)).to(dtype)
        genes = self.norm((genes / (n_genes + 1).sqrt()).to(dtype)) * weight
        return self.out(torch.cat((genes, others.to(dtype), size.to(dtype)), dim=-1)), sums


class Mulan(nn.Module):
    """The decoder with its two heads.

    Parameters
    ----------
    config
        Shape of the network. Weights are torch's defaults until :meth:`initialise` or a loaded file fills them.
    """

    def __init__(self, config: MulanConfig) -> None:
        super().__init__()
        self.config = config
        self.precision = "fp32"
        """Precision of the blocks' matrix products (:mod:`scmulan.infer.precision`)."""
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

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.word.weight.device

    def initialise(self, seed: int) -> Self:
        """Initialise all weights as GPT-2 does: normal with deviation 0.02, less for residual outputs with depth."""
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

    # -- hidden states -------------------------------------------------------------------------------------------------

    def forward(self, entity: Tensor, value: Tensor, cache: KVCache | None = None, new: Tensor | None = None) -> Tensor:
        """Compute hidden states after the last norm.

        Parameters
        ----------
        entity, value
            int64 ``[B, T]``, right-padded with anything: causal attention never looks right.
        cache
            Tokens read before; those of this call are added to it.
        new
            int64 ``[B]``: number of tokens of each row that are no padding; needed with a cache (default: all).

        Returns
        -------
        Tensor
            ``[B, T, W]``.
        """
        x_BTW, set_sums = self._embed(entity, value, cache)
        mask = None if cache is None else cache.mask(entity.shape[1])
        for layer, block in enumerate(self.blocks):
            x_BTW = block(x_BTW, cache, layer, mask)
        if cache is not None:
            cache.advance(entity.shape[1], new, set_sums)
        return self.norm(x_BTW)

    def forward_last(self, entity: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        """Compute the hidden state at the last token of each row, as :meth:`forward` would give it, for less work.

        The last block and the norm run at that position only; every other position just gives a key and a value.

        Parameters
        ----------
        entity, value
            int64 ``[B, T]``, right-padded with anything.
        lengths
            int64 ``[B]``: tokens of each row, at least one.

        Returns
        -------
        Tensor
            ``[B, W]``.
        """
        x_BTW = self._embed(entity, value, None)[0]  # no name for the running sums, which would keep them in memory
        *lower, top = self.blocks
        for layer, block in enumerate(lower):
            x_BTW = block(x_BTW, None, layer, None)
        assert isinstance(top, Block)
        return self.norm(top.forward_at(x_BTW, lengths - 1))

    def _embed(self, entity: Tensor, value: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """Return the input of the first block, and the running sums of the set state if there is one."""
        x_BTW = self.word(entity) + self.level(value)
        if self.set_state is None:
            return x_BTW, None
        state_BTW, set_sums = self.set_state(entity, value, cache)
        return x_BTW + state_BTW, set_sums

    # -- heads ---------------------------------------------------------------------------------------------------------

    def entity_logits(self, hidden: Tensor) -> Tensor:
        """Compute the logit of every token: ``[..., W]`` → ``[..., V]``."""
        logits = self.entity_head(hidden)
        return logits if self.entity_bias is None else logits + self.entity_bias

    def log_weights(self, logits: Tensor, end: int) -> Tensor:
        """Compute the log of the weight with which each token competes to come next: ``[..., V]`` → ``[..., V]``.

        Notes
        -----
        All genes that a cell surely has are equally likely to come next, and as the cell goes on the odds that a gene
        is still to come fall by the same factor for all genes. With weight σ(z) the first is saturation and the
        second one common shift of z; softmax, whose weight is exp(z), can say neither. The end token keeps exp(z).
        """
        if not self.config.bounded_genes:
            return logits
        bounded = F.logsigmoid(logits)
        bounded[..., end] = logits[..., end]
        return bounded

    def value_mean(self, hidden: Tensor) -> Tensor:
        """Compute the expected bin of every token, if it came next: ``[..., W]`` → ``[..., V]``."""
        mean = self.value_head(hidden)
        return mean if self.value_bias is None else mean + self.value_bias

    def value_mean_of(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Compute the expected bin of one token each: ``[..., W]`` and int64 ``[...]`` (or 1) → ``[...]``."""
        mean = (self.value_head.weight[token] * hidden).sum(-1)
        return mean if self.value_bias is None else mean + self.value_bias[token]

    def level_log_probs(self, mean: Tensor, token: Tensor) -> Tensor:
        """Compute the log-probability of each bin 1…levels of given tokens.

        A logistic distribution around the mean with the token's own scale, cut into bins of width one; the outer bins
        hold the tails.

        Parameters
        ----------
        mean
            Expected bins ``[...]`` (from :meth:`value_mean`).
        token
            Token ids ``[...]``.

        Returns
        -------
        Tensor
            ``[..., levels]``; rows sum to one after ``exp``.
        """
        assert self.log_scale is not None
        edges = torch.arange(1, self.config.levels, device=mean.device, dtype=mean.dtype) + 0.5
        scale = self.log_scale[token].exp()[..., None]
        below = (edges - mean[..., None]) / scale  # upper edge of bins 1 … levels − 1
        # log(sigmoid(b) − sigmoid(a)) = logsigmoid(b) + logsigmoid(−a) + log(1 − exp(a − b)), stable in both tails
        inner = F.logsigmoid(below[..., 1:]) + F.logsigmoid(-below[..., :-1]) + torch.log(-torch.expm1(-1 / scale))
        return torch.cat((F.logsigmoid(below[..., :1]), inner, F.logsigmoid(-below[..., -1:])), dim=-1)

    def new_cache(self, rows: int, capacity: int, *, kind: type[KVCache] | None = None) -> KVCache:
        """Return an empty key-value cache.

        Parameters
        ----------
        rows
            Number of sentences.
        capacity
            Tokens that each has room for.
        kind
            Class of the cache (default: the fastest for device and precision).
        """
        c, weight = self.config, self.word.weight
        sums = torch.zeros(rows, 2 * c.width + 1, device=weight.device) if self.set_state is not None else None
        like = weight.new_empty(0, dtype=torch.bfloat16 if self.precision == "bf16" else weight.dtype)
        if kind is None:
            kind = CpuKVCache if like.device.type == "cpu" and like.dtype == torch.float32 else KVCache
        return kind.empty(c.layers, rows, c.heads, capacity, c.width // c.heads, set_sums=sums, like=like)
