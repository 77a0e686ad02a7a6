"""The kernels as a library: compiled once a machine, where a graph first needs them."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from kasmina_fx._torch.cpp import compiled_library

#: In this order they are one source.
SOURCES: Final = (
    *("lanes.h", "functions.h", "products.h", "tile.h", "blueprint.h", "gradients.h"),
    *("tiles.cpp", "statistics.cpp"),
)
#: Rows of a block, as in ``lanes.h``: kept chunks are padded to whole blocks.
ROWS: Final = 16


class Functions(NamedTuple):
    """Holds the functions of the library."""

    forward: Any
    backward: Any
    observe: Any


#: Pointers that each takes behind its sizes.
_POINTERS: Final = Functions(forward=9, backward=11, observe=3)


@cache
def _compiled() -> Functions | str:
    """Return the functions, or in words why there are none."""
    here = Path(__file__).parent
    source = "\n".join((here / name).read_text() for name in SOURCES)
    try:
        library = compiled_library(source)
    except Exception as problem:  # a compiler's, a loader's, Inductor's own: many kinds
        first = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return f"no kernel could be compiled for this CPU ({first[:120]})"
    found = Functions(*(getattr(library, f"kasmina_{name}") for name in Functions._fields))
    for function, pointers in zip(found, _POINTERS, strict=True):
        function.argtypes = [ctypes.c_void_p] * (1 + pointers)
        function.restype = None
    return found


def why_none() -> str | None:
    """Say why there are no kernels, or None where there are: the first call compiles them."""
    found = _compiled()
    return found if isinstance(found, str) else None


def functions() -> Functions:
    """Return the kernels.

    Raises:
        RuntimeError: There are none.
    """
    found = _compiled()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found
