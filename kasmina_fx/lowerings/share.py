"""Whether a pass over all features takes the place of one over the tiles of seeds that run.

Both are timed by ``benchmarks/kernels.py``. What decides is the share of the features at which they
break even on an H100, not the cost model: most of what a pass over all features saves is a kernel
of the activation that follows, which is no part of a blend's own time.
"""

from __future__ import annotations

from typing import Final

import torch

from kasmina_fx.lowerings.base import Site
from kasmina_fx.lowerings.plan import KERNELS, plans_of
from kasmina_fx.lowerings.rows import KEEP_THEIR_INPUT
from kasmina_fx.physical.layout import power_of_two

#: From which share on, where an activation rides along that keeps its input for backward. Of 4,096
#: features, half of them active, a step took 460 us where tiles and a GELU took 940. ``FILLED``:
#: the same without a backward, where chunks fill tiles (of 4, 8, 16, ... features, loaded several
#: at a time). With one, a pass over 6 % took 1.14 times the host's step, tiles 1.18, but 1.30
#: times its memory, tiles 1.00. ``ODD``: with a backward, of chunks whose features are loaded one
#: by one: of 9 and 3 features they broke even at about 0.6 and above 0.9.
SHARE: Final = 0.25
FILLED: Final = 0.05
ODD: Final = 0.6
#: The same where no activation rides: of chunks of 12, 9 and 3 features, 16,384 rows, tiles and a
#: pass broke even at 0.52, 0.75 and above 1.
ALONE: Final = 0.6


def why_no_pass(site: Site) -> str | None:
    """Say why no kernel passes over all features of such a layer, or None if one can."""
    for bank in site.banks:
        if bank.kind in KERNELS and not KERNELS[bank.kind].rows:
            return f"blueprint {bank.kind} has no kernel of whole rows"
    if site.dtype == torch.float32 and any(plan.wide for plan in plans_of(site)):
        return "float32 products of wide chunks are more than a program's registers hold"
    return None


def why_tiles(site: Site) -> str | None:
    """Say why tiles alone are quicker than such a pass, or None if the pass is."""
    rides = site.then in KEEP_THEIR_INPUT
    if site.share >= (_with_activation(site) if rides else ALONE):
        return None
    beside = "" if rides else ", and no activation that keeps its input rides along"
    return f"{site.share:.0%} of the features run: tiles touch these alone{beside}"


def _with_activation(site: Site) -> float:
    plans = plans_of(site)
    if site.training:
        return ODD if any(plan.size % 2 and not plan.wide for plan in plans) else SHARE
    return FILLED if all(p.size >= 4 and p.size == power_of_two(p.size) for p in plans) else SHARE
