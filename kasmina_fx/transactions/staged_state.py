"""Checked changes of a layer's seed state, staged on the host and published as a whole.

The device buffers are what is saved, reported and computed with. A host mirror of the same numbers
is what is checked and changed: no change waits for the device, and nothing is read back from it.
The one exception is alpha: a ramp computes it on the device, and the host asks for it when needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kasmina_fx.transactions.buffers import Float32Module, to_device
from kasmina_fx.transactions.threads import ModelThreads, refuse_inside_forward


@dataclass(frozen=True, eq=False)
class Version:
    """The state at one moment; nothing in it is ever written to.

    Attributes:
        rows: int32 ``(S, 4)`` on the CPU.
        alpha: float32 ``(S,)`` on the CPU, or None where the device alone knows.
        device_alpha: Alphas that the device computed and that are not published yet.
        edits: Alphas to set on the device (ids, values), where the host does not know the others.
        writes: To be called when it is published.
    """

    rows: Tensor
    alpha: Tensor | None
    device_alpha: Tensor | None = None
    edits: tuple[tuple[Tensor, Tensor], ...] = ()
    writes: tuple[Callable[[], None], ...] = ()


class StagedState(Float32Module):
    """Holds the buffers ``state_tensor``, int32 ``(S, 4)``, and ``alpha``, float32 ``(S,)``."""

    state_tensor: Tensor
    alpha: Tensor

    def __init__(self, num_seeds: int) -> None:
        super().__init__()
        self.register_buffer(
            "state_tensor", torch.zeros(num_seeds, 4, dtype=torch.int32, device="cpu")
        )
        self.register_buffer("alpha", torch.zeros(num_seeds, dtype=torch.float32, device="cpu"))
        self._committed = Version(self.state_tensor.clone(), self.alpha.clone())
        self._staged: Version | None = None
        self._owner = 0
        self.threads = ModelThreads()  # those of the model, once a layer of it holds this
        #: Gives what is told of a publication, if that is still there: a weak reference, since it
        #: holds this.
        self.on_publish: Callable[[], Callable[[bool], None] | None] | None = None

    @property
    def _seen(self) -> Version:
        """What this thread sees: its own transaction, or the last state published."""
        staged = self._staged
        if staged is not None and self._owner == threading.get_ident():
            return staged
        return self._committed

    @property
    def staging(self) -> bool:
        """Whether this thread is inside a transaction."""
        return self._staged is not None and self._owner == threading.get_ident()

    @property
    def rows(self) -> Tensor:
        """The seeds' states, int32 ``(S, 4)`` on the CPU, not to be written to."""
        return self._seen.rows

    @property
    def alphas(self) -> Tensor:
        """The seeds' alphas, float32 ``(S,)`` on the CPU, not to be written to.

        After a ramp, asking costs one copy from the device.
        """
        return self._alphas_of(self._seen)

    def _alphas_of(self, version: Version) -> Tensor:
        if version.alpha is not None:
            return version.alpha
        with self.threads.commands:
            source = self.alpha if version.device_alpha is None else version.device_alpha
            values = source.detach().to("cpu", torch.float32, copy=True)
            if version is self._committed:
                self._committed = replace(version, alpha=values)
            for ids, new in version.edits:
                values = values.index_put((ids,), new)
        return values

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside become visible at once, at the end; an exception undoes them all."""
        refuse_inside_forward()
        with self.threads.commands, torch.inference_mode(False):
            before = self._staged
            if before is None:
                self._owner, self._staged = threading.get_ident(), self._committed
            try:
                yield
            except BaseException:
                self._staged = before
                raise
            if before is None:
                assert self._staged is not None  # ours since we set it
                version, self._staged = self._staged, None
                self._publish(version)

    def _stage_rows(self, ids: Tensor, rows: Tensor) -> None:
        version = self._staged
        assert version is not None  # only inside a transaction
        self._staged = replace(version, rows=version.rows.index_put((ids,), rows))

    def _stage_alpha(self, ids: Tensor, values: Tensor) -> None:
        version = self._staged
        assert version is not None  # only inside a transaction
        if version.alpha is not None:
            self._staged = replace(version, alpha=version.alpha.index_put((ids,), values))
        else:
            self._staged = replace(version, edits=(*version.edits, (ids, values)))

    def stage_all(self, rows: Tensor, alpha: Tensor) -> None:
        """Put in rows int32 ``(S, 4)`` and alphas float32 ``(S,)``, on the CPU, that are right.

        Call it inside a transaction. Nobody may write to them afterwards.
        """
        version = self._staged
        assert version is not None  # only inside a transaction
        self._staged = replace(version, rows=rows, alpha=alpha, device_alpha=None, edits=())

    def at_publication(self, write: Callable[[], None]) -> None:
        """Call ``write`` when, and if, this transaction is published.

        It is for tensors that are not versions.
        """
        version = self._staged
        assert version is not None  # only inside a transaction
        self._staged = replace(version, writes=(*version.writes, write))

    def set_device_alpha(self, alpha: Tensor) -> None:
        """Take alphas that the device computed, float32 ``(S,)``; nothing is read back."""
        with self.transaction():
            assert self._staged is not None  # inside a transaction
            known = alpha.clone() if alpha.device.type == "cpu" else None
            self._staged = replace(self._staged, alpha=known, device_alpha=alpha, edits=())

    def on_device(self) -> tuple[Tensor, Tensor]:
        """Return state int32 ``(S, 4)`` and alpha float32 ``(S,)`` as this thread sees them."""
        version, device = self._seen, self.state_tensor.device
        if version is self._committed:
            return self.state_tensor, self.alpha
        return to_device(version.rows, device), self._device_alpha(version)

    def _device_alpha(self, version: Version) -> Tensor:
        device = self.alpha.device
        if version.alpha is not None:
            same = version.alpha is self._committed.alpha
            return self.alpha if same else to_device(version.alpha, device)
        alpha = self.alpha if version.device_alpha is None else version.device_alpha
        for ids, values in version.edits:
            alpha = alpha.index_put((to_device(ids, device),), to_device(values, device))
        return alpha

    def _publish(self, version: Version) -> None:
        # New tensors instead of writing in place: a backward still to run keeps its forward's.
        old, device = self._committed, self.state_tensor.device
        if version is old:
            return
        with self.threads.forwards.publication():
            for write in version.writes:
                write()
            moved = version.rows is not old.rows
            if moved:
                self.state_tensor = to_device(version.rows, device)
            self.alpha = self._device_alpha(version)
            self._committed = replace(version, device_alpha=None, edits=(), writes=())
            listener = None if self.on_publish is None else self.on_publish()
            if listener is not None:
                listener(moved)

    @torch.inference_mode(False)
    def refresh_mirror(self) -> None:
        """Take the mirror from the device buffers: after they were loaded."""
        self._committed = Version(
            self.state_tensor.detach().to("cpu", copy=True),
            self.alpha.detach().to("cpu", torch.float32, copy=True),
        )

    @torch.inference_mode(False)
    def restore(self) -> None:
        """Put the mirror into the device buffers, whatever was written to them."""
        known = self._committed
        self.state_tensor = to_device(known.rows, self.state_tensor.device)
        if known.alpha is not None:
            self.alpha = to_device(known.alpha, self.alpha.device)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the listener out; it connects again."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's, unannotated
        return state | {"on_publish": None, "_staged": None, "_owner": 0}
