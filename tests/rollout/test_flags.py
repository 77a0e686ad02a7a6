"""Feature flags: who is on, what a file may say, and what changes while models run."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasmina_fx.errors import InvalidArgument, InvalidFlags, InvalidType, KasminaError
from kasmina_fx.rollout import (
    DEFAULT_FLAGS,
    FeatureFlagManager,
    get_feature_manager,
    is_feature_enabled,
    set_feature_manager,
)

CHUNKED = "chunked_architecture"


@pytest.fixture
def flags_path(tmp_path: Path) -> Path:
    return tmp_path / "config" / "flags.json"


def written(path: Path, flags: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(flags if isinstance(flags, str) else json.dumps(flags))
    return path


def of(path: Path, **said: Any) -> FeatureFlagManager:
    return FeatureFlagManager(written(path, {CHUNKED: said}))


def place(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100


def test_signatures_are_those_that_existing_code_calls() -> None:
    def names(member: Any) -> list[str]:
        return list(inspect.signature(member).parameters)

    assert names(FeatureFlagManager)[0] == "config_path"
    assert names(FeatureFlagManager.is_enabled)[:3] == ["self", "feature", "model_id"]
    assert names(FeatureFlagManager.set_enabled) == ["self", "feature", "enabled"]
    assert names(FeatureFlagManager.set_rollout_percentage)[:3] == ["self", "feature", "percentage"]
    assert names(FeatureFlagManager.add_to_allowlist) == ["self", "feature", "model_id"]
    assert names(FeatureFlagManager.save_flags) == ["self"]


def test_without_a_file_eight_flags_have_their_defaults(flags_path: Path) -> None:
    manager = FeatureFlagManager(flags_path)
    on = {name for name in manager.flags if manager.is_enabled(name, "m")}
    assert len(manager.flags) == 8
    assert on == {"performance_monitoring", "ab_testing"}


def test_an_unknown_flag_is_off_with_one_warning(
    flags_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = FeatureFlagManager(flags_path)
    assert [manager.is_enabled("no_such_flag"), manager.is_enabled("no_such_flag")] == [False] * 2
    assert [r.getMessage() for r in caplog.records] == ["Unknown feature flag: no_such_flag"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, False),
        ({"enabled": True}, True),
        ({"allowlist": ["m"]}, True),
        ({"allowlist": ["other"]}, False),
        ({"rollout_percentage": 100}, True),
        ({"rollout_percentage": 0}, False),
        ({"blocklist": ["m"], "allowlist": ["m"], "enabled": True}, False),
        ({"blocklist": ["m"], "rollout_percentage": 100}, False),
        ({"blocklist": ["other"], "enabled": True}, True),
        ({"allowlist": ["fc"]}, True),
        ({"allowlist": ["m/fc"]}, True),
        ({"allowlist": ["m/other"]}, False),
        ({"blocklist": ["m/fc"], "enabled": True}, False),
        ({"blocklist": ["fc"], "allowlist": ["m"]}, False),
    ],
)
def test_the_first_that_says_something_decides(
    flags_path: Path, said: dict[str, Any], expected: bool
) -> None:
    assert of(flags_path, **said).is_enabled(CHUNKED, "m", layer_id="fc") is expected


def test_a_model_that_nobody_names_gets_what_all_get(flags_path: Path) -> None:
    some = of(flags_path, rollout_percentage=100, allowlist=["m"], blocklist=["n"])
    assert not some.is_enabled(CHUNKED)
    some.set_enabled(CHUNKED, True)
    assert some.is_enabled(CHUNKED)


@given(st.text(min_size=1), st.integers(0, 100), st.integers(0, 100))
def test_a_percentage_takes_the_same_models_always_and_a_higher_one_lets_none_go(
    name: str, low: int, high: int
) -> None:
    manager = FeatureFlagManager("no_such_file.json")
    name = name.encode(errors="ignore").decode() or "m"
    low, high = sorted((low, high))
    manager.set_rollout_percentage(CHUNKED, low)
    before = manager.is_enabled(CHUNKED, name)
    assert before == (place(name) < low)
    manager.set_rollout_percentage(CHUNKED, high)
    assert manager.is_enabled(CHUNKED, name) or not before


def test_a_percentage_may_count_layers(flags_path: Path) -> None:
    manager = of(flags_path, rollout_percentage=50, rollout_by="layer")
    layers = [f"h.{i}" for i in range(40)]
    on = [manager.is_enabled(CHUNKED, "m", layer_id=name) for name in layers]
    assert on == [place(f"m/{name}") < 50 for name in layers]
    assert {True, False} == set(on)
    assert manager.is_enabled(CHUNKED, layer_id="h.1") == (place("h.1") < 50)
    assert not manager.is_enabled(CHUNKED, "m")


def test_a_percentage_is_clamped(flags_path: Path) -> None:
    manager = FeatureFlagManager(flags_path)
    for given_, kept in ((140, 100), (-3, 0), (33, 33)):
        manager.set_rollout_percentage(CHUNKED, given_)
        assert manager.flags[CHUNKED].rollout_percentage == kept
    manager.set_rollout_percentage(CHUNKED, 33, by="layer")
    assert manager.flags[CHUNKED].rollout_by == "layer"


def test_lists_take_a_name_once_and_give_it_back(flags_path: Path) -> None:
    manager = FeatureFlagManager(flags_path)
    manager.add_to_allowlist(CHUNKED, "m")
    manager.add_to_allowlist(CHUNKED, "m")
    assert manager.flags[CHUNKED].allowlist == ("m",)
    manager.add_to_blocklist(CHUNKED, "m")
    assert not manager.is_enabled(CHUNKED, "m")
    manager.remove_from_blocklist(CHUNKED, "m")
    assert manager.is_enabled(CHUNKED, "m")
    manager.remove_from_allowlist(CHUNKED, "m")
    manager.remove_from_allowlist(CHUNKED, "m")
    assert not manager.is_enabled(CHUNKED, "m")


# The file.

BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "no JSON"),
    "not UTF-8": (None, "can't be read"),
    "a list": ([], "object of flags"),
    "no object": ({CHUNKED: True}, "give an object"),
    "a typo in a key": ({CHUNKED: {"enable": True}}, "enable.*no such key; known are enabled"),
    "name": ({CHUNKED: {"name": "x"}}, "no such key"),
    "enabled": ({CHUNKED: {"enabled": "true"}}, "true or false"),
    "percentage": ({CHUNKED: {"rollout_percentage": 101}}, "0 to 100"),
    "a share": ({CHUNKED: {"rollout_percentage": 0.5}}, "integer"),
    "a bool": ({CHUNKED: {"rollout_percentage": True}}, "integer"),
    "allowlist": ({CHUNKED: {"allowlist": "m"}}, "list of names"),
    "blocklist": ({CHUNKED: {"blocklist": [1]}}, "list of names"),
    "rollout_by": ({CHUNKED: {"rollout_by": "user"}}, '"model" or "layer"'),
    "a flag's name": ({"Chunked": {}}, "lower-case"),
    "twice": ('{"a": {}, "a": {}}', "'a' is there twice"),
}


@pytest.mark.parametrize(("flags", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_by_name_and_the_flags_stay(
    flags_path: Path, flags: Any, message: str
) -> None:
    manager = of(flags_path, enabled=True)
    if flags is None:
        flags_path.write_bytes(b"\xff\xfe\xff")
    else:
        written(flags_path, flags)
    with pytest.raises(InvalidFlags, match=message) as caught:
        manager.reload()
    assert "flags.json" in str(caught.value)
    assert isinstance(caught.value, KasminaError)
    assert isinstance(caught.value, ValueError)
    assert manager.is_enabled(CHUNKED)
    with pytest.raises(InvalidFlags, match=message):
        FeatureFlagManager(flags_path)


def test_reload_says_whether_a_flag_has_changed(flags_path: Path) -> None:
    manager = of(flags_path)
    assert not manager.reload()
    written(flags_path, {CHUNKED: {"enabled": True}, "own": {"enabled": True}})
    assert manager.reload()
    assert manager.is_enabled(CHUNKED)
    assert manager.is_enabled("own")
    flags_path.unlink()
    assert manager.reload()
    assert set(manager.flags) == {flag.name for flag in DEFAULT_FLAGS}


def test_a_watched_file_is_read_again_when_it_changes(
    flags_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(flags_path, {})
    watching, other = FeatureFlagManager(flags_path, watch=0.0), FeatureFlagManager(flags_path)
    rare = FeatureFlagManager(flags_path, watch=3600.0)
    assert not watching.is_enabled(CHUNKED)
    written(flags_path, {CHUNKED: {"enabled": True}})
    assert watching.is_enabled(CHUNKED)
    assert not other.is_enabled(CHUNKED)
    assert not rare.is_enabled(CHUNKED)
    written(flags_path, "{")
    assert all(watching.is_enabled(CHUNKED) for _ in range(3))
    assert [r.levelno for r in caplog.records].count(logging.ERROR) == 1
    written(flags_path, {CHUNKED: {"enabled": True}, "other": {}})
    os.utime(flags_path, ns=(1, 1))
    assert "other" not in watching.flags
    assert watching.is_enabled(CHUNKED)
    assert "other" in watching.flags
    os.utime(flags_path, ns=(2, 2))  # touched, and the same
    assert watching.is_enabled(CHUNKED)


def test_saving_is_whole_keeps_permissions_and_round_trips(flags_path: Path) -> None:
    manager = FeatureFlagManager(flags_path, watch=0.0)
    manager.set_rollout_percentage(CHUNKED, 30, by="layer")
    manager.add_to_allowlist(CHUNKED, "m")
    manager.save_flags()
    assert FeatureFlagManager(flags_path).flags == manager.flags
    flags_path.chmod(0o640)
    manager.set_enabled("triton_kernels", True)
    manager.save_flags()
    assert stat.S_IMODE(flags_path.stat().st_mode) == 0o640
    assert FeatureFlagManager(flags_path).is_enabled("triton_kernels")
    assert os.listdir(flags_path.parent) == ["flags.json"]


def test_a_save_that_fails_leaves_the_old_file(
    flags_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = of(flags_path, enabled=True)
    before = flags_path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    manager.set_enabled(CHUNKED, False)
    with pytest.raises(OSError, match="no space"):
        manager.save_flags()
    assert flags_path.read_bytes() == before
    assert os.listdir(flags_path.parent) == ["flags.json"]


# The environment.


@pytest.mark.parametrize("value", ["true", "1", "Yes", "ON"])
def test_the_environment_turns_a_feature_on_for_all_that_are_not_blocked(
    flags_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MORPHOGENETIC_FEATURE_CHUNKED_ARCHITECTURE", value)
    manager = of(flags_path, blocklist=["n"])
    assert manager.is_enabled(CHUNKED, "m")
    assert not manager.is_enabled(CHUNKED, "n")


def test_the_environment_turns_a_feature_off_for_all(
    flags_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = of(flags_path, enabled=True, allowlist=["m"], rollout_percentage=100)
    assert manager.is_enabled(CHUNKED, "m")
    monkeypatch.setenv("MORPHOGENETIC_FEATURE_CHUNKED_ARCHITECTURE", "false")
    monkeypatch.setenv("MORPHOGENETIC_FEATURE_NO_SUCH_FLAG", "perhaps")
    assert manager.reload()
    assert not manager.is_enabled(CHUNKED, "m")
    manager.save_flags()  # says nothing of the environment
    assert json.loads(flags_path.read_text())[CHUNKED]["enabled"] is True


def test_a_variable_that_is_neither_true_nor_false_is_refused(
    flags_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORPHOGENETIC_FEATURE_CHUNKED_ARCHITECTURE", "maybe")
    with pytest.raises(InvalidFlags, match="CHUNKED_ARCHITECTURE='maybe': give true or false"):
        FeatureFlagManager(flags_path)


# Arguments.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.set_enabled("nope", True), InvalidArgument, "nope.*known are chunked"),
        (lambda m: m.set_enabled(CHUNKED, 1), InvalidType, "bool"),
        (lambda m: m.set_rollout_percentage("nope", 1), InvalidArgument, "nope"),
        (lambda m: m.set_rollout_percentage(CHUNKED, 0.5), InvalidType, "int"),
        (lambda m: m.set_rollout_percentage(CHUNKED, 5, by="user"), InvalidArgument, "layer"),
        (lambda m: m.add_to_allowlist("nope", "m"), InvalidArgument, "nope"),
        (lambda m: m.add_to_allowlist(CHUNKED, ""), InvalidArgument, "name of a model"),
        (lambda m: m.add_to_blocklist(CHUNKED, 3), InvalidType, "model_id=3: give a str"),
        (lambda m: FeatureFlagManager(_any(3)), InvalidType, "path"),
        (lambda m: FeatureFlagManager(watch=-1), InvalidArgument, "watch=-1"),
        (lambda m: set_feature_manager(_any(3)), InvalidType, "FeatureFlagManager"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(
    flags_path: Path, call: Any, error: type[Exception], message: str
) -> None:
    manager = of(flags_path, rollout_percentage=7)
    before = manager.flags
    with pytest.raises(error, match=message):
        call(manager)
    assert manager.flags == before


def _any(value: Any) -> Any:
    return value


def test_copies_share_the_flags_and_pickles_their_file(flags_path: Path) -> None:
    manager = of(flags_path, enabled=True)
    assert copy.deepcopy({"flags": manager})["flags"] is manager
    other = pickle.loads(pickle.dumps(manager))
    assert other.flags == manager.flags
    assert other.config_path == flags_path


# The manager that all share.


@pytest.fixture
def _nobodys_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    set_feature_manager(None)
    yield
    set_feature_manager(None)


@pytest.mark.usefixtures("_nobodys_manager")
def test_all_share_one_manager_of_the_usual_file() -> None:
    written(Path("config/morphogenetic_features.json"), {CHUNKED: {"allowlist": ["m"]}})
    assert get_feature_manager() is get_feature_manager()
    assert is_feature_enabled(CHUNKED, "m")
    assert not is_feature_enabled(CHUNKED)
    own = FeatureFlagManager("elsewhere.json")
    set_feature_manager(own)
    assert get_feature_manager() is own
