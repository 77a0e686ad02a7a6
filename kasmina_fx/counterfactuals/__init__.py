"""What a model would do without some of its seeds.

``off.py`` turns seeds off for a while, ``groups.py`` says which, ``evaluate.py`` measures what each
group is worth and ``report.py`` tells it.
"""

from kasmina_fx.counterfactuals.evaluate import counterfactual
from kasmina_fx.counterfactuals.groups import SeedGroup, groups_by_layer, groups_by_seed
from kasmina_fx.counterfactuals.off import seeds_off
from kasmina_fx.counterfactuals.report import CounterfactualReport, Worth

__all__ = [
    "CounterfactualReport",
    "SeedGroup",
    "Worth",
    "counterfactual",
    "groups_by_layer",
    "groups_by_seed",
    "seeds_off",
]
