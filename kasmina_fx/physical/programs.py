"""Programs that are made of a model hold plain operators of torch, and run without this package.

``torch.export``, and with it AOTInductor and ONNX, and ``torch.jit.trace`` record what a layer
computes, not its marker: nobody who loads a program knows an operator of ours. Only who rewrites
exported graphs asks for markers.

    >>> from torch import nn
    >>> from kasmina_fx import KasminaLayer
    >>> from kasmina_fx.testing import graft
    >>> layer, x = KasminaLayer(nn.Linear(4, 6), 3), torch.zeros(2, 4)
    >>> graft(layer, 1, "affine")
    >>> "kasmina.blend" in str(torch.export.export(layer, (x,)).graph)
    False
    >>> with recording_markers():
    ...     "kasmina.blend" in str(torch.export.export(layer, (x,)).graph)
    True
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kasmina_fx._torch.dynamo import being_recorded
from kasmina_fx._torch.tracing import in_functorch

#: Who is inside of :func:`recording_markers`; not a ContextVar, which Dynamo would have to trace.
_ASKED: list[None] = []


@contextmanager
def recording_markers() -> Iterator[None]:
    """Let ``torch.export`` record markers inside, for :func:`kasmina_fx.rewrite`."""
    _ASKED.append(None)
    try:
        yield
    finally:
        _ASKED.pop()


def plain_operators() -> bool:
    """Say whether a blend is to be made of operators of torch alone.

    It is in programs, and under transforms of ``torch.func``, which take no operator with a
    registered backward (torch 2.13). Values and gradients are the same, but for the guard against
    NaN in gradients and the reconstruction loss.
    """
    if being_recorded():
        return not _ASKED
    return not torch.compiler.is_dynamo_compiling() and in_functorch()
