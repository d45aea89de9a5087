"""Precision of inference: linear layers in fewer bits, how fast and how close to fp32 they are, and the choice.

``fp32`` is the reference. ``bf16`` and ``int8`` change the matrix products of the blocks only (almost all of the work);
embeddings, norms, the residual stream and both heads stay in float32. Which of them is faster differs between machines
by an order of magnitude in either direction, so a block of the model's own shape is timed once, and the times are kept
in the user's cache folder. A faster precision is chosen only if it reproduces the labels and embeddings of fp32 on a
sample of the cells at hand.
"""

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmulan._machine import MeasurementCache, cpu
from scmulan.errors import ModelError
from scmulan.infer.scoring import score_labels
from scmulan.model.cost import best_seconds
from scmulan.model.loading import LoadedModel
from scmulan.model.network import Block, MulanConfig
from scmulan.vocab.sentences import Sentences

Precision = Literal["auto", "fp32", "bf16", "int8"]
PRECISIONS = ("fp32", "bf16", "int8")

# What a precision has to keep of fp32's results: fraction of equal labels, smallest cosine between embeddings.
MIN_EQUAL_LABELS = 0.995
MIN_COSINE = 0.999
# Cells that a comparison rests on, and the fraction of a job's cells that it may take.
MAX_SAMPLE_CELLS, MIN_SAMPLE_CELLS, MAX_SAMPLE_FRACTION = 200, 32, 0.05
# Speed relative to fp32 from which on another rounding is worth it.
MIN_SPEEDUP = 1.1
# Tokens for which precisions are timed, and fewer ones that sort out emulated precisions.
TIMED_TOKENS, TRIAL_TOKENS = 512, 32
# A precision that is this many times slower than the fastest on the trial tokens is not timed.
MAX_TRIAL_SLOWDOWN = 10

# -- linear layers -----------------------------------------------------------------------------------------------------

# int8 inputs are stored as 128 + x so that they are unsigned: unsigned × signed is the pair that x86 multiplies fast.
ZERO_POINT = 128
MAX_INT8 = 127


class HalfLinear(nn.Linear):
    """A linear layer in bfloat16, which the network adds into its float32 stream.

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
        """Map any floating-point ``[..., in]`` to bfloat16 ``[..., out]``."""
        return F.linear(input.to(torch.bfloat16), self.weight, self.bias)


def int8_available() -> bool:
    """Return whether this build of torch can multiply 8-bit matrices with packed weights (oneDNN, on CPUs)."""
    return all(hasattr(torch.ops.onednn, name) for name in ("qlinear_prepack", "qlinear_pointwise"))


class Int8Linear(nn.Module):
    """A linear layer whose product is in 8-bit integers.

    Parameters
    ----------
    layer
        The layer in float32.

    Notes
    -----
    Weights have one scale per output, inputs one scale per row, found when they come: what a row gives does not depend
    on its neighbours.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / MAX_INT8
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.scale = scale
        self.zeros = torch.zeros(self.out_features, dtype=torch.int64)
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, input: Tensor) -> Tensor:
        """Map any floating-point ``[..., in]`` to float32 ``[..., out]``."""
        rows = input.reshape(-1, self.in_features)
        largest = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        # Conversion cuts off: with half a step more it rounds.
        rounded = torch.addcmul(rows.new_tensor(ZERO_POINT + 0.5), rows, MAX_INT8 / largest).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, ZERO_POINT, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(largest / MAX_INT8)
        return (y if self.bias is None else y + self.bias).view(*input.shape[:-1], self.out_features)


# -- a model in a precision --------------------------------------------------------------------------------------------


def apply_precision(model: LoadedModel, precision: Precision, *, tokens: int = TIMED_TOKENS) -> LoadedModel:
    """Return a model that computes in a precision; the one given is left as it is and shares its other weights.

    Parameters
    ----------
    model
        In float32, as loaded.
    precision
        ``"fp32"``, ``"bf16"`` or ``"int8"``; ``"auto"`` takes the fastest one that was found before to agree with
        fp32 on this machine, else fp32 (see :func:`choose_precision`, which compares them).
    tokens
        Tokens per pass for which ``"auto"`` compares times: few in decoding, many in annotation.

    Raises
    ------
    ModelError
        If the precision is unknown, or not available here.
    """
    if precision == "auto":
        precision = _known_precision(model, tokens)
    if precision not in PRECISIONS:
        raise ModelError(f"precision {precision!r} is not known: expected 'auto', {', '.join(map(repr, PRECISIONS))}")
    if model.network.precision == precision:
        return model
    if model.network.precision != "fp32":
        raise ModelError(f"the model computes in {model.network.precision} already: load it again for {precision}")
    device = model.network.device
    if precision == "int8" and not (device.type == "cpu" and int8_available()):
        raise ModelError(f"precision 'int8' is not available on {device} with torch {torch.__version__}: use 'bf16'")
    network = _shallow_copy(model.network)
    network.precision = precision
    network.blocks = nn.ModuleList(_converted(block, precision) for block in model.network.blocks)
    return replace(model, network=network.eval())


def _converted(module: nn.Module, precision: str) -> nn.Module:
    """Copy a module with its linear layers in a precision; other parts are shared."""
    if isinstance(module, nn.Linear):
        return HalfLinear(module) if precision == "bf16" else Int8Linear(module)
    converted = _shallow_copy(module)
    for name, child in module.named_children():
        converted._modules[name] = _converted(child, precision)
    return converted


def _shallow_copy(module: Any) -> Any:
    """Copy a module so that it shares its parts and may get others."""
    new = copy.copy(module)
    new._modules = dict(module._modules)
    return new


# -- speed -------------------------------------------------------------------------------------------------------------


def block_seconds(config: MulanConfig, device: torch.device, tokens: int = TIMED_TOKENS) -> dict[str, float]:
    """Measure the seconds that one block takes, by precision, of those that can be used here.

    A precision that is an order of magnitude slower than fp32 (emulated) is given up after a few tokens.
    """
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, float] = {}
    with torch.inference_mode():
        block = Block(config).to(device).eval()
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        few, many = (
            torch.randn(1, n, config.width, generator=generator).to(device) for n in (min(tokens, TRIAL_TOKENS), tokens)
        )
        fastest = float("inf")
        for precision in PRECISIONS:
            try:
                converted = block if precision == "fp32" else _converted(block, precision)
                trial = best_seconds(partial(converted, few, None, 0, None), device=device, repeats=1)
                if trial > MAX_TRIAL_SLOWDOWN * fastest:
                    continue
                fastest = min(fastest, trial)
                seconds[precision] = best_seconds(partial(converted, many, None, 0, None), device=device, repeats=3)
            except (RuntimeError, AttributeError):  # not in this build, or not on this device
                continue
    return seconds


def cached_block_seconds(config: MulanConfig, device: torch.device, tokens: int = TIMED_TOKENS) -> dict[str, float]:
    """Return :func:`block_seconds`, measured once per machine and kept in the user's cache folder."""
    cache = _measurements()
    key = f"seconds {_machine(device)} width {config.width} heads {config.heads} bias {config.bias} rows {tokens}"
    kept = cache.get(key)
    if isinstance(kept, dict) and kept.get("fp32") and all(isinstance(v, float) for v in kept.values()):
        return {name: kept[name] for name in PRECISIONS if name in kept}
    seconds = block_seconds(config, device, tokens)
    cache.put(key, seconds)
    return seconds


def _measurements() -> MeasurementCache:
    return MeasurementCache("precision.json")


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu()['model']} {device.type}"
    return f"{name} threads {torch.get_num_threads()} torch {torch.__version__}"


def _worthwhile(seconds: dict[str, float]) -> list[Literal["bf16", "int8"]]:
    """Return the precisions that are fast enough to be worth their rounding, fastest first."""
    fast: list[Any] = [p for p, s in seconds.items() if s * MIN_SPEEDUP < seconds["fp32"]]
    return sorted(fast, key=seconds.__getitem__)


# -- agreement with fp32 -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionAgreement:
    """Agreement of results in a precision with those in fp32."""

    cells: int
    """Number of cells compared."""
    labels: float
    """Fraction of them with the same fine label (or coarse, of a model that knows no fine ones)."""
    cosine: float
    """Smallest cosine between the two embeddings of a cell."""

    @property
    def sufficient(self) -> bool:
        """Whether the precision may be chosen."""
        return self.labels >= MIN_EQUAL_LABELS and self.cosine >= MIN_COSINE


def compare_precision(model: LoadedModel, other: LoadedModel, prompts: Sentences) -> PrecisionAgreement:
    """Compare labels and embeddings of annotation prompts between a model in fp32 and in another precision."""
    a, b = score_labels(model, prompts), score_labels(other, prompts)
    labels = [s.fine if s.fine.shape[1] else s.coarse for s in (a, b)]
    same = labels[0].argmax(1) == labels[1].argmax(1) if labels[0].shape[1] else np.ones(len(prompts), dtype=bool)
    norms = np.linalg.norm(a.hidden, axis=1) * np.linalg.norm(b.hidden, axis=1)
    cosine = (a.hidden * b.hidden).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)
    return PrecisionAgreement(cells=len(prompts), labels=float(same.mean()), cosine=float(cosine.min()))


def _kept_agreement(model: LoadedModel, precision: str) -> PrecisionAgreement | None:
    """Return the agreement found before for these weights on this machine, or None."""
    kept = _measurements().get(_agreement_key(model, precision))
    try:
        return PrecisionAgreement(cells=int(kept["cells"]), labels=float(kept["labels"]), cosine=float(kept["cosine"]))
    except (KeyError, TypeError, ValueError):
        return None


def _agreement_key(model: LoadedModel, precision: str) -> str:
    return f"agreement {precision} {model.weights_hash} {_machine(model.network.device)}"


# -- the choice --------------------------------------------------------------------------------------------------------


def choose_precision(model: LoadedModel, prompts: Sentences, total: int | None = None) -> LoadedModel:
    """Return the model in the fastest precision that agrees with fp32 on cells at hand.

    Parameters
    ----------
    model
        In float32.
    prompts
        Annotation prompts, a sample of which is compared; those of cells without genes are left out.
    total
        Cells of the whole job (default: those of the prompts). The comparison takes about a twentieth of it; a job too
        small for that is done in fp32, unless an earlier one has compared these weights.
    """
    total = len(prompts) if total is None else total
    filled = np.flatnonzero(prompts.lengths > 1)
    n = min(MAX_SAMPLE_CELLS, int(total * MAX_SAMPLE_FRACTION), len(filled))
    if n < MIN_SAMPLE_CELLS:
        return apply_precision(model, "auto")
    sample = prompts.take(filled[np.linspace(0, len(filled) - 1, n).astype(np.int64)])
    for precision in _worthwhile(cached_block_seconds(model.config, model.network.device)):
        agreement = _kept_agreement(model, precision)
        if agreement is None or agreement.cells < n:
            agreement = compare_precision(model, apply_precision(model, precision), sample)
            _measurements().put(_agreement_key(model, precision), asdict(agreement))
        if agreement.sufficient:
            return apply_precision(model, precision)
    return model


def _known_precision(model: LoadedModel, tokens: int) -> Literal["fp32", "bf16", "int8"]:
    """Return the fastest precision that was found to agree before, without comparing anything now."""
    sufficient = {p for p in PRECISIONS[1:] if (kept := _kept_agreement(model, p)) is not None and kept.sufficient}
    if not sufficient:
        return "fp32"
    fast = _worthwhile(cached_block_seconds(model.config, model.network.device, tokens))
    return next((precision for precision in fast if precision in sufficient), "fp32")
