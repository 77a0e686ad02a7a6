"""The backend ``torch.compile(model, backend="kasmina")`` runs the passes, then Inductor.

One module-level function, found through the entry point ``torch_dynamo_backends``. Options reach
Inductor as patches for this compile; global config is never touched.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from torch.fx import GraphModule

from kasmina_fx._torch.dynamo import note_compiled
from kasmina_fx._torch.inductor import compile_with_inductor, inductor_option_names, mode_options
from kasmina_fx.errors import InvalidArgument, UnknownOption, shown
from kasmina_fx.passes import GraphPass, find_matches, passes_for, run_passes
from kasmina_fx.passes.infra.small_loops import inductor_options
from kasmina_fx.physical.operators import DECOMPOSITIONS

_LOG = logging.getLogger(__name__)
_OWN: Final = ("lowering", "strict", "disabled_passes", "passes", "debug_dir")


def kasmina(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite a graph that Dynamo captured and compile it with Inductor.

    Args:
        gm: The captured graph; rewritten in place. Without a KasminaLayer in it, it is compiled as
            it is.
        example_inputs: As Dynamo gives them.
        mode: As of ``torch.compile``: "default", "reduce-overhead", "max-autotune", ...
        options: ``lowering`` ("auto": what is predicted to be the quickest; or "fused", "matmul",
            "loop", "dense", for which "matmul" stands in where they can't), ``strict`` (fail when a
            KasminaLayer was not rewritten), ``disabled_passes``, ``passes`` (a pipeline of your
            own), ``debug_dir`` (write the graph before and after there); any other key is an
            Inductor option.

    Raises:
        UnknownOption: A key that neither has; the message names the closest.
    """
    passes, patches = split_options(mode, options)
    debug_dir = (options or {}).get("debug_dir")
    before = gm.print_readable(print_output=False) if debug_dir else ""
    note_compiled(match.layer for match in find_matches(gm))
    modified = run_passes(gm, passes).modified
    if debug_dir:
        _write_debug(Path(debug_dir), before, gm.print_readable(print_output=False))
    _LOG.info("rewrote a graph" if modified else "nothing to rewrite")
    return compile_rewritten(gm, example_inputs, inductor_options(gm) | patches)


def compile_rewritten(
    gm: GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Compile with Inductor a graph that the passes are done with."""
    return compile_with_inductor(gm, example_inputs, patches, DECOMPOSITIONS, _source_digest())


@cache
def _source_digest() -> str:
    """Return what names this release of the package to Inductor's cache on disk.

    The cache knows an operator by its name alone, and would hand out the backward of another one.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return f" kasmina_fx {digest.hexdigest()}"


def split_options(
    mode: str | None, options: Mapping[str, Any] | None
) -> tuple[tuple[GraphPass, ...], dict[str, Any]]:
    """Return the pipeline and the Inductor patches that a mode and options ask for.

    Raises:
        UnknownOption, InvalidArgument: Says what is allowed.
    """
    asked: object = {} if options is None else options
    if not isinstance(asked, Mapping) or not all(isinstance(key, str) for key in asked):
        raise InvalidArgument(f"options={shown(options)}: give a dict of names and values")
    given = dict(asked)
    disabled = given.pop("disabled_passes", ())
    if isinstance(disabled, str) or not isinstance(disabled, Sequence):
        raise InvalidArgument(f"disabled_passes={shown(disabled)}: give a list of pass names")
    own = given.pop("passes", None)
    if own is not None and not (
        isinstance(own, Sequence) and all(isinstance(each, GraphPass) for each in own)
    ):
        raise InvalidArgument(
            f"passes={shown(own)}: give a list of passes, as DEFAULT_PASSES is one"
        )
    if own is not None and (given.keys() & {"lowering", "strict"} or disabled):
        raise InvalidArgument("passes is the whole pipeline: give it, or lowering and the like")
    strict = bool(given.pop("strict", False))
    passes = tuple(own or ()) or passes_for(
        given.pop("lowering", "auto"), strict=strict, disabled=disabled
    )
    given.pop("debug_dir", None)
    known = inductor_option_names()
    for key in given:
        if key.replace("-", "_") not in known:
            close = difflib.get_close_matches(key, [*_OWN, *known], n=1)
            hint = f"did you mean {shown(close[0])}? " if close else ""
            raise UnknownOption(
                f"unknown option {shown(key)}: {hint}kasmina's own are {', '.join(_OWN)}; all "
                "others are names of torch._inductor.config"
            )
    patches = mode_options(mode) | {key.replace("-", "_"): value for key, value in given.items()}
    return passes, patches


def _write_debug(folder: Path, before: str, after: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in folder.glob(f"graph_{os.getpid()}_*_before.py"))
    for name, text in (("before", before), ("after", after)):
        path = folder / f"graph_{os.getpid()}_{number}_{name}.py"
        path.write_text(text, encoding="utf-8")


__all__ = ["kasmina", "split_options"]
