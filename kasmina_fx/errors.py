"""Every error that the package raises on purpose.

Each one is a :class:`KasminaError` and the built-in exception that fits, so that both
``except KasminaError`` and ``except ValueError`` work. Messages say what was given, what is
allowed, and which layer and seed.
"""

from __future__ import annotations


class KasminaError(Exception):
    """The base class of all errors of this package."""


class InvalidArgument(KasminaError, ValueError):
    """An argument has the right type and a wrong value."""


class InvalidType(KasminaError, TypeError):
    """An argument has a wrong type."""


class SeedIndexError(KasminaError, IndexError, ValueError):
    """A seed id lies outside the layer (a ``ValueError`` as well, as older code expects)."""


class UnknownBlueprint(KasminaError, ValueError):
    """A blueprint id or name was never registered."""


class InvalidBlueprint(KasminaError, ValueError):
    """A blueprint breaks the contract: it changes the shape or dtype, or mutates buffers."""


class IllegalTransition(KasminaError, ValueError):
    """The lifecycle does not have the transition asked for.

    Attributes:
        seed: The first seed that can't make it.
        source: Its stage; ``target``: the one asked for; ``legal``: the ones that are legal now.
    """

    seed: int
    source: int
    target: int
    legal: tuple[int, ...]


class InsideForward(KasminaError, RuntimeError):
    """Seeds were to change inside a model's forward."""


class RanksDiffer(KasminaError, RuntimeError):
    """Processes that train one model together hold different seeds, or would soon."""


class LayoutMismatch(KasminaError, RuntimeError):
    """A state dict was written for another layout of seeds, chunks or blueprints."""


class CheckpointError(KasminaError, ValueError):
    """A checkpoint can't be written, or a file can't be loaded; nothing has changed."""


class InvalidFlags(KasminaError, ValueError):
    """A file of feature flags, or a variable that overrides one, can't be used."""


class NoTargets(KasminaError, ValueError):
    """A model has nothing that ``kasminify`` could take, or no KasminaLayer."""


class UnknownOption(KasminaError, ValueError):
    """A backend option is known neither to kasmina_fx nor to Inductor."""


class RewriteError(KasminaError, RuntimeError):
    """A graph could not be rewritten, or a pass's postcondition does not hold."""


class StillGrowing(KasminaError, RuntimeError):
    """``unkasminify`` would lose what blended seeds contribute, or ``finalize`` who still grows."""


class GraphMismatch(KasminaError, AssertionError):
    """A golden file, a recompile check or a comparison of outputs does not hold."""


def shown(given: object) -> str:
    """Return what a message shows of a bad argument: its repr, cut off where it is long."""
    try:
        text = repr(given)
    except Exception:  # of an int with too many digits, or of anything of a user's
        text = f"a {type(given).__name__}"
    return text if len(text) <= 80 else f"{text[:76]} ..."
