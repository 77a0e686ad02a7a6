"""Whether a module's output has the features that its class says, before it gets seeds."""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor, nn

from kasmina_fx.bases.features import Features, find_features, floating_tensor
from kasmina_fx.errors import InvalidArgument

#: Norms: subclasses of theirs may take features elsewhere (ConvNeXt's channels-first LayerNorm).
_NORMS: Final = (nn.LayerNorm, nn.RMSNorm)


def why_no_features(base: nn.Module) -> str | None:
    """Say why a module's output can't be cut into chunks without a word of the caller's."""
    for parameter in base.parameters():
        if parameter.dtype.is_complex:
            return f"its parameters are {parameter.dtype}, and seeds compute with real numbers"
    try:
        features = find_features(base, None, None)
    except InvalidArgument as error:
        return str(error)
    # An exact type is known; of a forward of a user's own, no more is than what it does.
    own = all(type(base).forward is not kind.forward for kind in _NORMS)
    return _why_unlike_a_norm(base, features) if own and isinstance(base, _NORMS) else None


@torch.no_grad()
def _why_unlike_a_norm(base: nn.Module, features: Features) -> str | None:
    """Try a copy on an output of three dims, features last, as the class that it comes from has."""
    like = floating_tensor(base)
    probe = torch.ones(2, 3, features.count, device="cpu")
    probe = probe if like is None else probe.to(like.device, like.dtype)
    hint = "wrap it by hand, in KasminaLayer(module, num_seeds, chunk_sizes=..., feature_dim=...)"
    try:
        out = copy.deepcopy(base)(probe)
    except TypeError:
        return None  # it takes more than a tensor: nobody knows what
    except Exception as error:  # whatever a user's forward raises is the reason
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"a {type(base).__name__} on features in the last dim raised {said}: {hint}"
    if isinstance(out, Tensor) and out.shape != probe.shape:
        return f"a {type(base).__name__} turns {tuple(probe.shape)} into {tuple(out.shape)}: {hint}"
    return None
