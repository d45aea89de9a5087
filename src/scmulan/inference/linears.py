"""Linear layers that compute in fewer bits than float32, for inference.

Both take any floating-point input. :class:`HalfLinear` gives bfloat16, which the network adds into its float32 stream;
:class:`Int8Linear` gives float32. Weights have one scale per output, inputs one scale per row, found when they come:
what a row gives does not depend on its neighbours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
