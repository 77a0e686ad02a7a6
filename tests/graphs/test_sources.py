"""Where Dynamo found an input, as its placeholders spell it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from kasmina_fx._torch.dynamo import resolve_source
from kasmina_fx.passes.infra.metadata import clean_path


@pytest.fixture
def root() -> Any:
    return nn.ModuleDict({"args": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2))})


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['args']", "args"),
        ("L['model']._modules['args']", "args"),
        ("L['args'][0]._modules['b']._modules['0']", "b.0"),
        ("L['args'][0]._modules['args']", "args"),
        ("L['call'].__self__._modules['b']", "b"),
    ],
)
def test_a_path_starts_from_the_model_however_its_forward_names_it(
    source: str, path: str, root: Any
) -> None:
    assert clean_path(source) == path
    assert resolve_source(source.replace(".__self__", ""), root) is root.get_submodule(path)


def test_what_is_not_there_is_none(root: Any) -> None:
    assert resolve_source("L['self']._modules['nothing']", root) is None
