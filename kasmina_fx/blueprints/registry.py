"""Blueprint names: the built-ins, and what users add for the whole process."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Final

from torch import nn

from kasmina_fx.blueprints.base import Blueprint
from kasmina_fx.blueprints.builtin import BUILTINS
from kasmina_fx.blueprints.from_module import ModuleBlueprint
from kasmina_fx.errors import InvalidArgument, InvalidType, UnknownBlueprint, shown

#: What seeds grow unless told otherwise: of the built-ins, the one that measured best in training.
DEFAULT: Final = "residual_mlp"
_BY_KIND: Final[dict[str, Blueprint]] = {blueprint.kind: blueprint for blueprint in BUILTINS}
_NAME: Final = re.compile(r"[A-Za-z_][\w-]*")


def lookup(kind: str) -> Blueprint:
    """Return the blueprint of that name.

    Raises:
        InvalidType: No text.
        UnknownBlueprint: No such name; the message names the closest ones.
    """
    if not isinstance(kind, str):
        raise InvalidType(f"blueprint {shown(kind)}: give a registered name")
    found = _BY_KIND.get(kind)
    if found is None:
        close = difflib.get_close_matches(kind, _BY_KIND, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names())}"
        raise UnknownBlueprint(f"no blueprint is named {shown(kind)}; {hint}")
    return found


def names() -> tuple[str, ...]:
    """Return all names, built-ins first."""
    return tuple(_BY_KIND)


def register(
    blueprint: Blueprint | Callable[[int], nn.Module] | nn.Module, *, name: str | None = None
) -> str:
    """Give a blueprint a name that every layer of this process knows, and return the name.

    Args:
        blueprint: A :class:`Blueprint`, a factory ``chunk_size -> nn.Module``, or a module (then
            only for chunks that it fits).
        name: Letters, digits, ``_`` and ``-``; the blueprint's own name unless given. A name is
            taken once: graphs and checkpoints refer to it. Registering the same object again gives
            the name it has.

    Raises:
        InvalidType: Something else.
        InvalidArgument: A malformed name, or one that another blueprint has.
    """
    if not callable(blueprint) and not isinstance(blueprint, Blueprint):
        raise InvalidType(
            "a blueprint is a factory chunk_size -> nn.Module, a Blueprint or a module; got "
            f"{shown(blueprint)}"
        )
    for kind, known in _BY_KIND.items():
        source = known.factory if isinstance(known, ModuleBlueprint) else known
        if (source is blueprint or known is blueprint) and name in (None, kind):
            return kind
    own = blueprint.kind if isinstance(blueprint, Blueprint) else _name_of(blueprint)
    if name is None and not isinstance(blueprint, Blueprint):
        number = 1
        name = own
        while name in _BY_KIND:
            number += 1
            name = f"{own}-{number}"
    name = own if name is None else name
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"blueprint name {shown(name)}: letters, digits, '_' and '-', no digit first"
        )
    if name in _BY_KIND:
        raise InvalidArgument(f"blueprint name {shown(name)} is taken; choose another")
    if isinstance(blueprint, Blueprint):
        if blueprint.kind != name:
            raise InvalidArgument(f"this Blueprint names itself {shown(own)}, not {shown(name)}")
        _BY_KIND[name] = blueprint
    else:
        _BY_KIND[name] = ModuleBlueprint(name, blueprint)
    return name


def _name_of(blueprint: object) -> str:
    given = getattr(blueprint, "__name__", None) or type(blueprint).__name__
    cleaned = re.sub(r"[^\w-]", "", str(given)) or "blueprint"
    return cleaned if _NAME.fullmatch(cleaned) else f"blueprint{cleaned}"
