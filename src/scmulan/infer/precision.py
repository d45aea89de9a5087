"""In which precision a model computes: measured on this machine, then chosen.

``fp32`` is the reference. ``bf16`` and ``int8`` change the matrix products of the blocks only (almost all of the work);
embeddings, norms, the sums between layers and both heads stay in float32. Which of them is faster differs between
machines by an order of magnitude in either direction, so a block of the model's own shape is timed once, and the times
are kept in the user's cache folder. A faster precision is chosen only if it gives the labels and embeddings of fp32
on cells at hand.

Linear layers that compute in fewer bits than float32, for inference.

Both take any floating-point input. :class:`HalfLinear` gives bfloat16, which the network adds into its float32 stream;
:class:`Int8Linear` gives float32. Weights have one scale per output, inputs one scale per row, found when they come:
what a row gives does not depend on its neighbours.
"""

import copy
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmulan._machine import MeasurementCache, cpu
from scmulan.errors import ModelError
from scmulan.model.loading import LoadedModel
from scmulan.model.network import Block, MulanConfig
from scmulan.vocab.sentences import Sentences

Precision = Literal["auto", "fp32", "bf16", "int8"]
PRECISIONS = ("fp32", "bf16", "int8")

# What a precision has to keep of fp32's results.
LEAST_LABELS = 0.995
LEAST_COSINE = 0.999
# Cells that a verdict on a precision rests on, and the share of a job that finding it may take.
PROBE_CELLS, FEWEST_PROBE_CELLS, PROBE_SHARE = 200, 32, 0.05
# A precision has to be so much faster than fp32 to be worth another rounding.
WORTHWHILE = 1.1
TIMED_WORDS = 512


def apply_precision(model: LoadedModel, precision: Precision, *, rows: int = TIMED_WORDS) -> LoadedModel:
    """Return a model that computes in a precision; the one given is left as it is and shares its other weights.

    Parameters
    ----------
    model
        In float32, as loaded.
    precision
        ``"fp32"``, ``"bf16"`` or ``"int8"``; ``"auto"`` takes the fastest one that was found before to agree with
        fp32 on this machine, else fp32 (see :func:`choose_precision`, which finds out).
    rows
        Words per pass that ``"auto"`` compares times at: few in decoding, many in annotation.

    Raises
    ------
    ModelError
        If the precision is unknown, or not available here.
    """
    if precision == "auto":
        precision = _known(model, rows)
    if precision not in PRECISIONS:
        raise ModelError(f"precision {precision!r} is not known: expected 'auto', {', '.join(map(repr, PRECISIONS))}")
    if model.network.precision == precision:
        return model
    if model.network.precision != "fp32":
        raise ModelError(f"the model computes in {model.network.precision} already: load it again for {precision}")
    device = model.network.word.weight.device
    if precision == "int8" and not (device.type == "cpu" and int8_available()):
        raise ModelError(f"precision 'int8' is not available on {device} with torch {torch.__version__}: use 'bf16'")
    network = _shallow(model.network)
    network.precision = precision
    network.blocks = nn.ModuleList(_convert(block, precision) for block in model.network.blocks)
    return replace(model, network=network.eval())


def _convert(block: nn.Module, precision: str) -> nn.Module:
    """Copy a module with its linear layers in a precision; other parts are shared."""
    if isinstance(block, nn.Linear):
        return HalfLinear(block) if precision == "bf16" else Int8Linear(block)
    new = _shallow(block)
    for name, child in block.named_children():
        new._modules[name] = _convert(child, precision)
    return new


def _shallow(module: Any) -> Any:
    """Copy of a module that shares its parts and may get others."""
    new = copy.copy(module)
    new._modules = dict(module._modules)
    return new


# -- how fast ------------------------------------------------------------------------------------------------------


def block_seconds(config: MulanConfig, device: torch.device, rows: int = TIMED_WORDS) -> dict[str, float]:
    """Seconds that one block of this shape takes for ``rows`` words, by precision, of those that can be used.

    A precision that is an order of magnitude slower than fp32 (emulated) is given up after a few words.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    with torch.inference_mode():
        block = Block(config).to(device).eval()
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        few, many = (torch.randn(1, n, config.width, generator=generator).to(device) for n in (min(rows, 32), rows))
        limit = float("inf")
        for precision in PRECISIONS:
            try:
                made = block if precision == "fp32" else _convert(block, precision)
                first = _best(made, few, device, repeats=1)
                if first > 10 * limit:
                    continue
                limit = min(limit, first)
                found[precision] = _best(made, many, device)
            except (RuntimeError, AttributeError):  # not in this build, or not on this device
                continue
    return found


def _best(block: nn.Module, x: Tensor, device: torch.device, repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        block(x, None, 0, None)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def speeds(config: MulanConfig, device: torch.device, rows: int = TIMED_WORDS) -> dict[str, float]:
    """:func:`block_seconds`, measured once per machine and kept in the cache folder."""
    cache = MeasurementCache("precision.json")
    key = f"seconds {_machine(device)} width {config.width} heads {config.heads} bias {config.bias} rows {rows}"
    kept = cache.get(key)
    if isinstance(kept, dict) and kept.get("fp32") and all(isinstance(v, float) for v in kept.values()):
        return {name: kept[name] for name in PRECISIONS if name in kept}
    found = block_seconds(config, device, rows)
    cache.put(key, found)
    return found


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu()['model']} {device.type}"
    return f"{name} threads {torch.get_num_threads()} torch {torch.__version__}"


# -- how right -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far results in a precision are those of fp32."""

    cells: int
    """Cells compared."""
    labels: float
    """Share of them with the same fine label (or coarse, of a model that knows no fine ones)."""
    cosine: float
    """Smallest cosine between the two embeddings of a cell."""

    @property
    def good(self) -> bool:
        """Whether the precision may be chosen."""
        return self.labels >= LEAST_LABELS and self.cosine >= LEAST_COSINE


def agreement(model: LoadedModel, other: LoadedModel, prompts: Sentences) -> Agreement:
    """Compare labels and embeddings of annotation prompts between a model in fp32 and in another precision."""
    from scmulan.infer.scoring import score_labels

    a, b = score_labels(model, prompts), score_labels(other, prompts)
    said = [s.fine if s.fine.shape[1] else s.coarse for s in (a, b)]
    same = said[0].argmax(1) == said[1].argmax(1) if said[0].shape[1] else np.ones(len(prompts), dtype=bool)
    norms = np.linalg.norm(a.hidden, axis=1) * np.linalg.norm(b.hidden, axis=1)
    cosine = (a.hidden * b.hidden).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)
    return Agreement(cells=len(prompts), labels=float(same.mean()), cosine=float(cosine.min()))


def choose_precision(model: LoadedModel, prompts: Sentences, total: int | None = None) -> LoadedModel:
    """Return the model in the fastest precision that agrees with fp32 on cells at hand.

    Parameters
    ----------
    model
        In float32.
    prompts
        Annotation prompts, some of which are compared; those of cells without genes are left out.
    total
        Cells of the whole job (default: those of the prompts). The comparison takes about a twentieth of it; a job too
        small for that is done in fp32, unless an earlier one has settled the matter for these weights.
    """
    total = len(prompts) if total is None else total
    filled = np.flatnonzero(prompts.lengths > 1)
    n = min(PROBE_CELLS, int(total * PROBE_SHARE), len(filled))
    if n < FEWEST_PROBE_CELLS:
        return apply_precision(model, "auto")
    probe = prompts.take(filled[np.linspace(0, len(filled) - 1, n).astype(np.int64)])
    cache = MeasurementCache("precision.json")
    device = model.network.word.weight.device
    for precision in _faster(speeds(model.config, device)):
        seen = _verdict(model, precision)
        if seen is None or seen.cells < n:
            seen = agreement(model, apply_precision(model, precision), probe)
            cache.put(_verdict_key(model, precision), asdict(seen))
        if seen.good:
            return apply_precision(model, precision)
    return model


def _known(model: LoadedModel, rows: int) -> Literal["fp32", "bf16", "int8"]:
    """Fastest precision that has been found to agree, without finding out anything new that takes long."""
    good = {p for p in PRECISIONS[1:] if (seen := _verdict(model, p)) is not None and seen.good}
    faster = _faster(speeds(model.config, model.network.word.weight.device, rows)) if good else []
    return next((precision for precision in faster if precision in good), "fp32")


def _faster(seconds: dict[str, float]) -> list[Literal["bf16", "int8"]]:
    """Precisions worth their rounding, fastest first."""
    worth: list[Any] = [p for p, s in seconds.items() if s * WORTHWHILE < seconds["fp32"]]
    return sorted(worth, key=seconds.__getitem__)


def _verdict(model: LoadedModel, precision: str) -> Agreement | None:
    """How a precision was seen to agree with fp32 for these weights on this machine, None where nobody knows."""
    kept = MeasurementCache("precision.json").get(_verdict_key(model, precision))
    try:
        return Agreement(cells=int(kept["cells"]), labels=float(kept["labels"]), cosine=float(kept["cosine"]))
    except (KeyError, TypeError, ValueError):
        return None


def _verdict_key(model: LoadedModel, precision: str) -> str:
    return f"agreement {precision} {model.weights_hash} {_machine(model.network.word.weight.device)}"


# Inputs are stored as 128 + x so that they are unsigned: the pair unsigned × signed is what x86 multiplies fast.
ZERO = 128
LARGEST = 127


class HalfLinear(nn.Linear):
    """A linear layer in bfloat16.

    Parameters
    ----------
    layer
        The layer in float32; its weights are copied.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().bfloat16(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` → bfloat16 ``[..., out]``."""
        return F.linear(input.to(torch.bfloat16), self.weight, self.bias)


def int8_available() -> bool:
    """Whether this build of torch can multiply 8-bit matrices with packed weights (oneDNN, on CPUs)."""
    return all(hasattr(torch.ops.onednn, name) for name in ("qlinear_prepack", "qlinear_pointwise"))


class Int8Linear(nn.Module):
    """A linear layer whose product is in 8-bit integers.

    Parameters
    ----------
    layer
        The layer in float32.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        whole = (weight / scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self.scale = scale
        self.zeros = torch.zeros(self.out_features, dtype=torch.int64)
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` → float32 ``[..., out]``."""
        rows = input.reshape(-1, self.in_features)
        largest = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        # Conversion cuts off: with half a step more it rounds.
        whole = torch.addcmul(rows.new_tensor(ZERO + 0.5), rows, LARGEST / largest).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, ZERO, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(largest / LARGEST)
        return (y if self.bias is None else y + self.bias).view(*input.shape[:-1], self.out_features)
