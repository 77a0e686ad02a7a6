"""Buffers whose dtype is not the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class Float32Module(nn.Module):
    """Its own float32 buffers stay float32, whatever dtype the model is converted to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {n: b for n, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, unannotated
        for name, old in before.items():
            new = self._buffers[name]
            if old.dtype == torch.float32 and new is not None and new.dtype != torch.float32:
                self._buffers[name] = old.to(new.device)
        return self
