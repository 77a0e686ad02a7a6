"""Every private name of Inductor that the package needs, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch._inductor
from torch._inductor import config as inductor_config

from kasmina_fx._torch.launches import quicken_inductor
from kasmina_fx.errors import InvalidArgument, shown


def inductor_option_names() -> frozenset[str]:
    """Return the names that ``torch._inductor.config`` has."""
    return frozenset(inductor_config.get_config_copy())


def mode_options(mode: Any) -> dict[str, Any]:
    """Return what a mode of ``torch.compile`` means to Inductor.

    Raises:
        InvalidArgument: No such mode.
    """
    modes: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode is not None and (not isinstance(mode, str) or mode not in modes):
        raise InvalidArgument(f"mode {shown(mode)}: there are {', '.join(modes)}")
    return dict(modes[mode]) if mode is not None else {}


def compile_with_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    patches: dict[str, Any],
    decompositions: Mapping[Any, Callable[..., Any]],
    cache_tag: str,
) -> Callable[..., Any]:
    """Run ``compile_fx`` with options for this compile alone and our operators' decompositions.

    ``cache_tag`` becomes part of the key that Inductor's cache on disk knows the graph by.
    """
    from torch._inductor.compile_fx import compile_fx  # seconds to import: only where it compiles
    from torch._inductor.decomposition import select_decomp_table

    from kasmina_fx._torch.padding import ViewsOfProducts

    quicken_inductor()
    if inductor_config.joint_custom_post_pass is None:  # else it is a user's own
        patches = {"joint_custom_post_pass": ViewsOfProducts()} | patches
    # Into the table, and not as compile_fx's argument, with which nothing is cached (torch 2.13).
    select_decomp_table().update(decompositions)
    tag = f"{torch.compiler.config.cache_key_tag}{cache_tag}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled = compile_fx(gm, example_inputs, config_patches=patches or None)
    return cast("Callable[..., Any]", compiled)  # the rest of the union is for ahead-of-time use
