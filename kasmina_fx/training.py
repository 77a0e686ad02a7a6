"""The thread that trains a model: gradients are for it alone to touch."""

from __future__ import annotations

import threading

import torch


class Training:
    """What the layers of one model know of the loop around them.

    Attributes:
        thread: Of the last forward with gradients, or optimizer step.
        awaits_backward: A compiled forward was run since an optimizer's last step.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.awaits_backward = False

    def seen(self) -> None:
        """This thread runs a forward."""
        if torch.is_grad_enabled():
            self.thread = threading.get_ident()

    def elsewhere(self) -> bool:
        """Does another thread train the model?"""
        return self.thread not in (None, threading.get_ident())
