"""What is taken of a model, what is left, and what is never called."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from small_net_cases import Broken, PassesBy, Recurrent, X, net
from torch import Tensor, nn

from kasmina_fx import InvalidArgument, InvalidType, KasminaLayer, kasminify


def test_a_dry_run_changes_nothing_and_names_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    report = kasminify(made, num_seeds=3, filter_fn=lambda m, name: name != "2", dry_run=True)
    assert report.taken == {"0": 3}
    assert report.left == {"1": "a LayerNorm is none of the targets", "2": "filter_fn says no"}
    assert type(made[0]) is nn.Linear
    with caplog.at_level(logging.INFO, logger="kasmina_fx"):
        kasminify(made, num_seeds=3, compile=False)
    assert "1: left: a LayerNorm is none of the targets" in caplog.text
    again = kasminify(made, num_seeds=5, dry_run=True)  # what was taken, now that it is
    assert again.taken == {"0": 3, "2": 2}
    assert again.left == {"1": "a LayerNorm is none of the targets"}


@pytest.mark.parametrize("name", ["compile", "dry_run"])
def test_switches_are_true_or_false(name: str) -> None:
    with pytest.raises(InvalidType, match=f"{name}='no'"):
        net(**{name: "no"})


@pytest.mark.parametrize("compile", [False, True])
def test_a_first_forward_names_what_it_never_calls(
    compile: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="kasmina_fx"):
        model = kasminify(PassesBy(), num_seeds=2, compile=compile)
        for _ in range(2):
            model(X)
    (record,) = [r for r in caplog.records if r.name.endswith("model_call")]
    assert record.getMessage().startswith("read: the model's first forward called none of these")


@pytest.mark.parametrize(("build", "x"), [(Broken, X), (Recurrent, X.view(1, 2, 4))])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, of any model with a break
def test_behind_a_graph_break_a_first_forward_runs_and_accuses_nobody(
    build: Callable[[], nn.Module], x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    model = kasminify(build(), num_seeds=2, options={"compile_threads": 1})
    with caplog.at_level(logging.WARNING, logger="kasmina_fx"):
        model(x)
    assert not [record for record in caplog.records if record.name.startswith("kasmina_fx")]


class Doubled(nn.Module):
    """It has features in its last dim, and nothing that says how many."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


def test_a_target_of_unknown_features_is_refused_with_what_makes_a_layer_of_it() -> None:
    model = nn.Sequential(Doubled())
    with pytest.raises(InvalidArgument, match=r"Doubled; wrap it by hand, in KasminaLayer\("):
        kasminify(model, targets=(Doubled,), num_seeds=2)
    model[0] = KasminaLayer(model[0], 2, chunk_sizes=[4, 4], feature_dim=-1)
    assert torch.equal(model(X), Doubled()(X))
