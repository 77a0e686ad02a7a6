"""Old or new by a flag, and the old one where the new one raises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from kasmina_fx.errors import InvalidType
from kasmina_fx.rollout import Fallback, FeatureFlagManager, MigrationRouter

CHUNKED = "chunked_architecture"


def old(x: int, *, scale: int = 1) -> tuple[str, int]:
    return "old", x * scale


def new(x: int, *, scale: int = 1) -> tuple[str, int]:
    return "new", x * scale


def router() -> tuple[FeatureFlagManager, MigrationRouter]:
    flags = FeatureFlagManager("no_such_file.json")
    return flags, MigrationRouter(flags)


def test_the_signature_is_the_one_that_existing_code_calls() -> None:
    names = list(inspect.signature(MigrationRouter.route_to_implementation).parameters)
    assert names[:5] == ["self", "feature", "legacy_fn", "new_fn", "args"]
    assert "model_id" in names


def test_a_flag_chooses_and_arguments_are_handed_on() -> None:
    flags, route = router()
    call = route.route_to_implementation
    assert call(CHUNKED, old, new, 3, scale=2) == ("old", 6)
    flags.add_to_allowlist(CHUNKED, "m")
    assert call(CHUNKED, old, new, 3, model_id="m", scale=2) == ("new", 6)
    assert call(CHUNKED, old, new, 3, model_id="n") == ("old", 3)
    flags.add_to_allowlist(CHUNKED, "fc")
    assert call(CHUNKED, old, new, 3, for_layer="fc") == ("new", 3)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, KeyError, MemoryError])
def test_what_raises_is_switched_off_for_that_layer_and_logged_once(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    flags, route = router()
    flags.set_enabled(CHUNKED, True)
    called = []

    def broken(x: int) -> Any:
        called.append(x)
        raise error("no kernel")

    for _ in range(3):
        answer = route.route_to_implementation(CHUNKED, old, broken, 3, for_layer="fc")
        assert answer == ("old", 3)
    assert called == [3]
    (record,) = caplog.records
    assert "fc" in record.getMessage()
    assert "'new' raised" in record.getMessage()
    assert "no kernel" in (route.fallback.why_off(f"{CHUNKED}:fc", "new") or "")
    # Another layer, and the feature as a whole, go on.
    assert route.route_to_implementation(CHUNKED, old, new, 3, for_layer="head") == ("new", 3)
    assert route.route_to_implementation(CHUNKED, old, new, 3) == ("new", 3)
    route.fallback.switch_on(f"{CHUNKED}:fc")
    assert route.route_to_implementation(CHUNKED, old, new, 3, for_layer="fc") == ("new", 3)


def test_a_call_that_neither_answers_is_at_fault_itself(caplog: pytest.LogCaptureFixture) -> None:
    flags, route = router()
    flags.set_enabled(CHUNKED, True)

    def picky(x: int) -> Any:
        if x < 0:
            raise ValueError("new: negative")
        return "new", x

    def picky_too(x: int) -> Any:
        raise ValueError("old: negative")

    with pytest.raises(ValueError, match="new: negative"):
        route.route_to_implementation(CHUNKED, picky_too, picky, -1)
    assert route.route_to_implementation(CHUNKED, picky_too, picky, 1) == ("new", 1)
    assert not caplog.records


def test_the_last_one_that_is_on_is_asked_though_it_raises() -> None:
    fallback = Fallback()

    def broken() -> None:
        raise RuntimeError("broken")

    assert fallback.run("fc", "a", {"a": broken, "b": lambda: 1}) == (1, "b")
    with pytest.raises(RuntimeError, match="broken"):
        fallback.run("fc", "b", {"b": broken})
    with pytest.raises(RuntimeError, match="broken"):  # off, and there is no other
        fallback.run("fc", "a", {"a": broken})
    fallback.switch_on("fc", "b")
    assert fallback.why_off("fc", "a")
    fallback.switch_on("fc", "a")
    assert fallback.why_off("fc", "a") is None


def test_flags_that_can_not_be_asked_are_refused() -> None:
    flags: Any = "flags.json"
    with pytest.raises(InvalidType, match="is_enabled"):
        MigrationRouter(flags)
