"""Slots are corrected by their own age, where an optimizer counts steps for a whole stack.

Adam divides its moments by what they lack because they started from zero: ``1 - beta ** step``. A
seed that germinates at step 3,000 starts from zero too, and the shared ``step`` says nothing of it:
its first steps would be several times too long. So after a step the young slots get what they would
have got if ``step`` were their own. For SGD, RMSprop, Adadelta and Rprop there is nothing to do:
their steps do not depend on how many there were.

What a step subtracts from a parameter is ``own * g + rest``; each function below gives the two, by
the formulas in the documentation of ``torch.optim``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from kasmina_fx.transactions.buffers import to_device

#: Under this name an optimizer's state of a stack has ``{"steps": int, "slots": {slot: int}}``: the
#: steps since the first slot was given to a new seed, and how many of them were before each.
BIRTHS: Final = "kasmina_births"


class _Rows(NamedTuple):
    """What a formula needs of some slots: the group's options, and rows of the state."""

    group: dict[str, Any]
    state: dict[str, Tensor]


Parts = tuple[Any, Any]
Formula = Callable[[_Rows, Tensor, Any], Parts]


def _adam(rows: _Rows, t: Tensor, _: Any) -> Parts:
    first, second = rows.group["betas"]
    squares = rows.state["max_exp_avg_sq" if rows.group["amsgrad"] else "exp_avg_sq"]
    size = (squares / (1 - second**t)).sqrt() + rows.group["eps"]
    return 0.0, rows.group["lr"] / (1 - first**t) * rows.state["exp_avg"] / size


def _adamax(rows: _Rows, t: Tensor, _: Any) -> Parts:
    first, _second = rows.group["betas"]
    step = rows.group["lr"] / (1 - first**t)
    return 0.0, step * rows.state["exp_avg"] / rows.state["exp_inf"].clamp_min(1e-38)


def _radam(rows: _Rows, t: Tensor, _: Any) -> Parts:
    first, second = rows.group["betas"]
    most = 2 / (1 - second) - 1
    length = most - 2 * t * second**t / (1 - second**t)
    known = ((length - 4) * (length - 2) * most).clamp_min(0)
    rectified = (known / ((most - 4) * (most - 2) * length.clamp_min(1e-6))).sqrt()
    adaptive = (1 - second**t).sqrt() / (rows.state["exp_avg_sq"].sqrt() + rows.group["eps"])
    factor = torch.where(length > 5, rectified * adaptive, 1.0)
    return 0.0, rows.group["lr"] / (1 - first**t) * rows.state["exp_avg"] * factor


def _nadam(rows: _Rows, t: Tensor, product: Any) -> Parts:
    first, second = rows.group["betas"]
    now, then = (first * (1 - 0.5 * 0.96 ** (s * rows.group["momentum_decay"])) for s in (t, t + 1))
    size = (rows.state["exp_avg_sq"] / (1 - second**t)).sqrt() + rows.group["eps"]
    own = rows.group["lr"] * (1 - now) / (1 - product) / size
    return own, rows.group["lr"] * then / (1 - product * then) * rows.state["exp_avg"] / size


def _adagrad(rows: _Rows, t: Tensor, _: Any) -> Parts:
    rate = rows.group["lr"] / (1 + (t - 1) * rows.group["lr_decay"])
    return rate / (rows.state["sum"].sqrt() + rows.group["eps"]), 0.0


_FORMULAS: Final[tuple[tuple[type[Optimizer], Formula], ...]] = (
    (optim.Adam, _adam),
    (optim.AdamW, _adam),
    (optim.NAdam, _nadam),
    (optim.RAdam, _radam),
    (optim.Adamax, _adamax),
    (optim.Adagrad, _adagrad),
)


def born(optimizer: Optimizer, state: dict[str, Any], slots: Collection[int]) -> None:
    """Slots start anew, in an optimizer's state of their stack; they are of age 0."""
    if "step" in state and _formula_of(optimizer) is not None:
        known = state.get(BIRTHS, {"steps": 0, "slots": {}})
        births = known["slots"] | dict.fromkeys(slots, known["steps"])
        state[BIRTHS] = {"steps": known["steps"], "slots": births}


def ages_of(optimizer: Optimizer, state: dict[str, Any], slots: list[int]) -> list[int] | None:
    """Steps that each slot has been in, in an optimizer's state; None where they don't matter."""
    if "step" not in state or _formula_of(optimizer) is None:
        return None
    births = state.get(BIRTHS, {"steps": 0, "slots": {}})
    shared = int(state["step"])
    return [births["steps"] - births["slots"].get(s, births["steps"] - shared) for s in slots]


def go_on(state: dict[str, Any], ages: dict[int, int]) -> None:
    """Slots are of such ages, which :func:`ages_of` returned for the same optimizer."""
    births = state.get(BIRTHS, {"steps": 0, "slots": {}})
    steps, shared = births["steps"], int(state["step"])
    young = {slot: steps - age for slot, age in ages.items() if age != shared}
    others = {slot: birth for slot, birth in births["slots"].items() if slot not in ages}
    state[BIRTHS] = {"steps": steps, "slots": others | young}


def _formula_of(optimizer: Optimizer) -> Formula | None:
    return next((formula for kind, formula in _FORMULAS if isinstance(optimizer, kind)), None)


def correct(optimizer: Optimizer, stack: Tensor, group: dict[str, Any]) -> None:
    """Let the young slots of a stack move as far as ones of their age, after a step; no sync.

    Called without gradients.
    """
    state = optimizer.state.get(stack, {})
    births = state.get(BIRTHS)
    if births is None or stack.grad is None:  # most, and there are hundreds
        return
    formula = _formula_of(optimizer)
    if formula is None:
        return
    steps = births["steps"] + 1
    ages = {slot: steps - birth for slot, birth in births["slots"].items()}
    oldest = _grown_up_at(group)
    young = {slot: age for slot, age in ages.items() if age < oldest}
    if not young:
        del state[BIRTHS]
        return
    state[BIRTHS] = {"steps": steps, "slots": {slot: steps - age for slot, age in young.items()}}
    where, age = _on(stack, list(young), torch.int64), _on(stack, list(young.values()))
    rows = _Rows(
        group,
        {
            name: value.index_select(0, where).float()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.shape == stack.shape
        },
    )
    beside = (-1, *[1] * (stack.dim() - 1))
    products = _on(stack, [_mu_product(group, a) for a in young.values()])
    shared = state["step"] if isinstance(state["step"], Tensor) else torch.tensor(state["step"])
    made = formula(rows, shared.to(torch.float32), state.get("mu_product"))
    right = formula(rows, age.view(beside), products.view(beside))
    now = stack.index_select(0, where).float()
    change = made[1] - right[1]
    if formula in (_nadam, _adagrad):  # of the others, no part is the gradient's own
        change = change + (made[0] - right[0]) * _gradient(stack, where, group, now, made)
    found = getattr(optimizer, "found_inf", None)  # a fused step under a GradScaler was left out
    if found is not None:
        change = torch.where(found > 0, torch.zeros_like(change), change)
    stack.index_copy_(0, where, (now + change).to(stack.dtype))


def _gradient(
    stack: Tensor, where: Tensor, group: dict[str, Any], now: Tensor, made: Parts
) -> Tensor:
    """What the step took for the gradient: weight decay makes it depend on where it started."""
    assert stack.grad is not None  # asked before
    own = stack.grad.index_select(0, where).float() * (-1 if group.get("maximize") else 1)
    decay = 0.0 if group.get("decoupled_weight_decay") else group["weight_decay"]
    before: Tensor = (now + made[0] * own + made[1]) / (1 - made[0] * decay)
    return own + decay * before


def _grown_up_at(group: dict[str, Any]) -> float:
    """The age at which a correction is below the last bit of a float32."""
    if "momentum_decay" in group:
        return 17 / (group["momentum_decay"] * -math.log(0.96)) if group["momentum_decay"] else 1e5
    if "betas" in group:
        return 17 / -math.log(max(float(b) for b in group["betas"]))
    return math.inf if group["lr_decay"] else 0


_PRODUCTS: Final[dict[tuple[float, float], list[float]]] = {}


def _mu_product(group: dict[str, Any], age: int) -> float:
    """The product of NAdam's momenta up to a step."""
    decay = group.get("momentum_decay")
    if decay is None:
        return 0.0
    first = float(group["betas"][0])
    known = _PRODUCTS.setdefault((first, decay), [1.0])
    while len(known) <= age:
        known.append(known[-1] * first * (1 - 0.5 * 0.96 ** (len(known) * decay)))
    return known[age]


def _on(stack: Tensor, values: list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), stack.device)
