"""What seeds ask of the module that they watch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kasmina_fx.features import Features, floating_tensor


class Host:
    """A layer's base as its seeds see it; a plain object, so that nothing registers it twice."""

    def __init__(self, base: nn.Module, features: Features) -> None:
        self.base, self.features = base, features

    @property
    def like(self) -> Tensor | None:
        """A floating-point tensor: its dtype and device are those of what grows."""
        return floating_tensor(self.base)

    @property
    def weight(self) -> Tensor | None:
        """Its weight; of a base without one, its first floating-point tensor."""
        weight = getattr(self.base, "weight", None)
        return weight if isinstance(weight, Tensor) else self.like

    def gradient_norm(self) -> Tensor | None:
        """Of the weight's gradient, or of all parameters' if the weight is none."""
        weight = getattr(self.base, "weight", None)
        whole = [weight] if isinstance(weight, nn.Parameter) else self.base.parameters()
        norms = [torch.linalg.vector_norm(p.grad.float()) for p in whole if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None
