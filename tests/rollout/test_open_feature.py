"""An OpenFeature client in place of the file, with the SDK's own provider."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from kasmina_fx.errors import InvalidType
from kasmina_fx.rollout import MigrationRouter, OpenFeatureFlags

api = pytest.importorskip("openfeature.api", reason="needs openfeature-sdk")
from openfeature.flag_evaluation import FlagResolutionDetails  # noqa: E402  # if there is one
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider  # noqa: E402

VARIANTS = {"on": True, "off": False}


def by_context(flag: Any, context: Any) -> Any:
    named = context.targeting_key == "m" or context.attributes.get("layer_id") == "fc"
    return FlagResolutionDetails(value=named)


@pytest.fixture
def client() -> Iterator[Any]:
    flags = {
        "kasmina.chunked_architecture": InMemoryFlag("off", VARIANTS, context_evaluator=by_context),
        "kasmina.triton_kernels": InMemoryFlag("on", VARIANTS),
        "kasmina.message_bus": InMemoryFlag("gone", {"text": "no bool"}),
    }
    api.set_provider(InMemoryProvider(flags))
    yield api.get_client()
    api.clear_providers()


def test_the_provider_answers_by_model_and_layer(client: Any) -> None:
    flags = OpenFeatureFlags(client, prefix="kasmina.")
    assert flags.is_enabled("triton_kernels")
    assert flags.is_enabled("chunked_architecture", "m")
    assert not flags.is_enabled("chunked_architecture", "n")
    assert flags.is_enabled("chunked_architecture", "n", layer_id="fc")
    assert not flags.is_enabled("chunked_architecture", layer_id="head")


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("feature", ["no_such_flag", "message_bus"])
def test_without_an_answer_the_default_holds_with_one_warning(
    client: Any, default: bool, feature: str, caplog: pytest.LogCaptureFixture
) -> None:
    flags = OpenFeatureFlags(client, prefix="kasmina.", default=default)
    assert [flags.is_enabled(feature) for _ in range(2)] == [default] * 2
    (warning,) = [r for r in caplog.records if r.name.startswith("kasmina_fx")]
    assert f"kasmina.{feature}" in warning.getMessage()


def test_copies_ask_the_same_client(client: Any) -> None:
    flags = OpenFeatureFlags(client)
    assert copy.deepcopy({"flags": flags})["flags"] is flags


def test_a_router_takes_it_for_flags(client: Any) -> None:
    route = MigrationRouter(OpenFeatureFlags(client, prefix="kasmina."))
    call = route.route_to_implementation
    assert call("triton_kernels", lambda: "old", lambda: "new") == "new"
    assert call("chunked_architecture", lambda: "old", lambda: "new", model_id="n") == "old"


def test_what_is_no_client_is_refused() -> None:
    with pytest.raises(InvalidType, match="get_client"):
        OpenFeatureFlags(object())
