"""What the operators of the fused lowerings share: their arguments, and the kernels at their ends.

``tables`` are those of :data:`TABLES`. ``said``, float32 ``(parts, 3, n)``, is what parts of the
rows say of seeds; ``sums``, float32 ``(slots * places, parts, numbers + 2)``, what they found for
the gradients of each place. Both are allocated in one dim: shapes that hold few symbols are quicker
to reason about, and of a deep model there are hundreds.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx._torch.triton import launches_on, launching
from kasmina_fx.lowerings.plan import Plan
from kasmina_fx.physical.layout import power_of_two

#: What ``tables`` holds, in order; of a bank but for the last four, which are the layer's.
TABLES: Final = ("order", "seeds", "positions", "modes", "alpha", "roles", "faults", "loss_scale")
#: Stacks of a blueprint, at most.
_STACKS: Final = 6
#: Seeds of a program that reports, and parts that it sums at once. Tuned on an H100, as the next.
_REPORT: Final = (2, 256)
#: Numbers that a warp of ``finish`` loads at once; of so many gradients on it has 8 warps, not 4.
_AT_ONCE: Final = 2048
_WIDE: Final = 512
DOTS: Final = {"float32": 0, "bfloat16": 1, "float16": 2}


def natively(device: torch.device) -> bool:
    """Say whether kernels in C++ stand for those in Triton."""
    return device.type == "cpu" and not launches_on(device)


def numbers_of(params: list[Tensor]) -> list[int]:
    """Return how many numbers a slot has in each stack."""
    return [math.prod(p.shape[1:]) for p in params]


def even(plan: Plan, step: int, features: int) -> int:
    """Return how many features may be loaded at once: a power of two that divides all steps."""
    return math.gcd(step, plan.offset, features, 8)


def four(params: list[Tensor]) -> list[Tensor]:
    """Return weight, bias, weight, bias; without biases the weights stand for them."""
    return params if len(params) == 4 else [params[0], params[0], params[1], params[1]]


def report(
    said: Tensor,
    parts: Any,
    before: Tensor | None,
    told: Tensor,
    tables: list[Tensor],
    plan: Plan,
    rows: Any,
) -> None:
    """Write into ``told``, float32 ``(3, n)``, the notes of a bank; others are as in ``before``."""
    positions, alpha, roles = tables[2], tables[4], tables[5]
    seeds, together = _REPORT
    launching("notes", "report")[((plan.count + seeds - 1) // seeds,)](
        said, said if before is None else before, told, positions, alpha, roles,
        plan.first_seed, plan.count, rows, parts,
        plan.size, together, before is not None, seeds,
    )  # fmt: skip


def gradients(tables: list[Tensor], params: list[Tensor], plan: Plan) -> list[Tensor]:
    """Return room for ``[blame, *dparams]``."""
    blame = tables[TABLES.index("faults")].new_empty(plan.count)
    return [blame, *(torch.empty_like(p) for p in params)]


def finish(
    sums: Tensor,
    parts: Any,
    tables: list[Tensor],
    found: list[Tensor],
    params: list[Tensor],
    plan: Plan,
) -> None:
    """Add what parts found, and write it into what :func:`gradients` returned."""
    _, seeds, positions, _, _, _, _, loss_scale = tables
    blame, *grads = found
    numbers = numbers_of(params)
    width = sum(numbers) + 2
    block = min(1024, power_of_two(width))
    # Not one that is written: the same tensor twice would have to be copied first.
    none = _STACKS - len(grads)
    padded = [*grads, *[sums] * none]
    capacity, (slots, places) = params[0].shape[0], seeds.shape
    warps = 4 if block < _WIDE else 8
    launching("finish", "finish", warps)[(capacity,)](
        sums, seeds, positions, loss_scale, blame, *padded,
        plan.count, capacity, slots, places, parts,
        *numbers, *[0] * none, width, block, warps * _AT_ONCE // block, 64,
    )  # fmt: skip


def sent_to_tables(blame: Tensor) -> list[Tensor | None]:
    """Return the gradients of tables: that of ``faults``."""
    return [blame if name == "faults" else None for name in TABLES]
