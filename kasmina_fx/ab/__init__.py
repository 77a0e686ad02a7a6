"""Both implementations on the same weights and batches: do they agree, and what does each cost.

    >>> import torch
    >>> from torch import nn
    >>> from kasmina_fx import HybridKasminaLayer
    >>> from kasmina_fx.testing import graft
    >>> net = nn.Sequential(HybridKasminaLayer(nn.Linear(8, 12), "fc", 4), nn.Linear(12, 2))
    >>> graft(net[0], [1, 2], "mlp")
    >>> report = compare(net, torch.randn(16, 8), steps=5)
    >>> report.parity, report.reasons
    (True, ())
    >>> shadow = ShadowMode(net, share=1.0)
    >>> with shadow:
    ...     out = net(torch.randn(16, 8))
    >>> shadow.report()["layers"]["fc"]["compared"]
    1

:func:`compare` trains two copies, before a rollout; :class:`ShadowMode` looks at calls during one.
"""

from kasmina_fx.ab.compare import ABReport, compare
from kasmina_fx.ab.differences import Bounds, Difference
from kasmina_fx.ab.intervals import Interval
from kasmina_fx.ab.shadow_mode import ShadowMode

__all__ = ["ABReport", "Bounds", "Difference", "Interval", "ShadowMode", "compare"]
