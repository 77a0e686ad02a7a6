"""A pipeline of one's own, and resets inside a watched block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_net_cases import X, net

from kasmina_fx import (
    DEFAULT_PASSES,
    InvalidArgument,
    kasmina,
)
from kasmina_fx.testing import assert_no_recompiles


def test_a_pipeline_of_ones_own_is_an_option_of_the_backend() -> None:
    torch._dynamo.reset()
    model = net()
    given: Any = {"passes": list(DEFAULT_PASSES)}
    run: Any = torch.compile(model, backend=kasmina, options=given)
    torch.testing.assert_close(run(X), model(X))
    options: dict[str, Any]
    for options in ({"passes": 5}, {"passes": [5]}, {"passes": DEFAULT_PASSES, "strict": True}):
        with pytest.raises(InvalidArgument, match="passes"):
            net(options=options)


def test_a_reset_inside_a_watched_block_is_no_error() -> None:
    with assert_no_recompiles():
        torch._dynamo.reset()
