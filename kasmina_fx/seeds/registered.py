"""What a layer has registered, and whether that is still what its forwards were told.

State, alphas and slots are buffers, so that ``state_dict()``, ``functional_call`` and averages of
models reach them. What forwards read is derived from them on the host. So a forward has to notice
two things: that other tensors stand in their place (``functional_call``), and that somebody
wrote to them (a copy, a broadcast, an average).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

#: Of :func:`seal`: it is from 2**31 to 2**32 + 2**31.
_LEAST: Final = 1 << 31
#: Averages of equal numbers, in float32 and cut off to ints, differ from them by this part or less.
_ROUNDING: Final = 1e-5

#: A module's dict of parameters or buffers, and a name in it.
Place = tuple[Mapping[str, Any], str]


class Registered:
    """The registered tensors of a layer at the moment when forwards were last told of them.

    Args:
        state: Modules, and the names of buffers that may only be replaced, never written to.
        banks: Of the layer: their stacks, and their ``slots``, which belong to the state.
    """

    def __init__(self, state: Iterable[tuple[nn.Module, str]], banks: Sequence[nn.Module]) -> None:
        places: list[Place] = [
            (m._buffers, name) for m, name in (*state, *((b, "slots") for b in banks))
        ]
        self._stacks = [
            (bank._parameters, name, stack)
            for bank in banks
            for name, stack in bank._parameters.items()
        ]
        self._state = [(holder, name, holder[name]) for holder, name in places]
        # Tensors made under inference_mode count no writes.
        known = [tensor for _, _, tensor in self._state if not tensor.is_inference()]
        self._versions = [(tensor, tensor._version) for tensor in known]

    # Asked before every call of a model, for all layers: loops, since a generator takes as long as
    # what it looks at.

    @property
    def replaced(self) -> bool:
        """Whether another tensor has taken the place of one of them."""
        for holder, name, tensor in self._stacks:
            if holder.get(name) is not tensor:
                return True
        return self.state_replaced

    @property
    def state_replaced(self) -> bool:
        """Whether another tensor has taken the place of one of the state's."""
        for holder, name, tensor in self._state:  # noqa: SIM110
            if holder.get(name) is not tensor:
                return True
        return False

    @property
    def written(self) -> bool:
        """Whether one of the state's tensors was written to."""
        for tensor, version in self._versions:  # noqa: SIM110
            if tensor._version != version:
                return True
        return False

    @property
    def all_written(self) -> bool:
        """Whether all of them were, as by a copy or an average of whole models."""
        return all(tensor._version != version for tensor, version in self._versions)


def seal(rows: Tensor, slots: Mapping[str, Tensor]) -> int:
    """Compute a number that tells one state of a layer's seeds from all others.

    An average of two states does not have the average of their seals.

    Args:
        rows: int32 ``(S, 4)`` on the CPU: the state tensor.
        slots: int64 ``(capacity,)`` each, on the CPU: the blueprint ids of every bank, by key.
    """
    found = zlib.crc32(rows.numpy().tobytes())
    for key in sorted(slots):
        held = slots[key].numpy()
        (used,) = held.nonzero()
        if used.size:  # an empty bank says nothing, of whatever size
            found = zlib.crc32(key.encode() + used.tobytes() + held[used].tobytes(), found)
    return _LEAST + found


def is_average_of(found: int, own: int) -> bool:
    """Say whether a seal is what averages of models, all in the state of ``own``, leave of it."""
    return abs(found - own) <= _ROUNDING * own
