"""What a forward reads, as one object."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.layout import BankSpec, format_banks
from kasmina_fx.tables import BankTables, LayerTables


class Published:
    """A layer's tables at one moment: replaced whole, so that none sees half a change.

    A plain object, because Dynamo (torch 2.11 to 2.13) forces the shapes of whatever it reaches as
    a module's parameter or buffer to be static.
    """

    def __init__(
        self,
        layer: LayerTables,
        specs: Sequence[BankSpec],
        tables: Sequence[BankTables],
        params: Sequence[Tensor],
    ) -> None:
        self.banks = format_banks(specs)
        # The same text where no blueprint cares: then nothing is compiled anew.
        self.banks_in_eval = format_banks([spec_in_eval(spec) for spec in specs])
        self.layer = list(layer) if specs else []
        self.seeds = [bank.seeds for bank in tables]
        self.positions = [bank.positions for bank in tables]
        self.modes = [bank.modes for bank in tables]
        self.trainees = [bank.trainees for bank in tables]
        self.params: list[Tensor] = list(params)

    def shows(self, params: Sequence[Tensor]) -> bool:
        """Are the stacks those that are registered now?"""
        same = map(operator.is_, self.params, params)
        return len(self.params) == len(params) and all(same)

    def with_alpha(self, alpha: Tensor) -> Published:
        """The same tables with other alphas."""
        changed = Published.__new__(Published)
        changed.__dict__.update(self.__dict__)
        if self.layer:
            changed.layer = [alpha, *self.layer[1:]]
        return changed

    def with_params(self, params: Sequence[Tensor]) -> Published:
        """The same tables with the parameters that are registered now."""
        changed = Published.__new__(Published)
        changed.__dict__.update(self.__dict__)
        changed.params = list(params)
        return changed


def spec_in_eval(spec: BankSpec) -> BankSpec:
    """What a bank is in evaluation: another one if its blueprint behaves differently there."""
    blueprint = lookup(spec.kind)
    return spec if blueprint.in_mode(False) is blueprint else replace(spec, training=False)
