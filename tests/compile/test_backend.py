"""The backend by itself: options, modes, debug files, plain models, global config untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graph_cases import OneLayer, layer_of, wrapped
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from kasmina_fx import InvalidArgument, RewriteError, UnknownOption, kasmina, kasminify
from kasmina_fx.backend import split_options
from kasmina_fx.testing import RecordingBackend, graft


def test_a_plain_model_is_compiled_as_inductor_would() -> None:
    plain, x = OneLayer(), torch.randn(3, 8)
    run = torch.compile(plain, backend=kasmina, fullgraph=True)
    torch.testing.assert_close(run(x), plain(x))


def test_it_is_found_by_name() -> None:
    assert "kasmina" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("kasmina") is kasmina


def test_options_and_mode_reach_inductor_and_nothing_else() -> None:
    before = inductor_config.get_config_copy()
    seen: list[dict[str, object]] = []

    def keep(gm: object, inputs: object, **_: object) -> object:
        seen.append({k: getattr(inductor_config, k) for k in ("epilogue_fusion", "max_autotune")})
        return gm

    model = kasminify(
        OneLayer(),
        num_seeds=4,
        mode="max-autotune-no-cudagraphs",
        options={
            "epilogue_fusion": False,
            "post_grad_custom_pre_pass": lambda g: keep(g, 0),
        },
    )
    model(torch.randn(3, 8))
    assert seen == [{"epilogue_fusion": False, "max_autotune": True}]
    after = inductor_config.get_config_copy()
    assert {k: v for k, v in after.items() if before[k] != v} == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epilog_fusion": True}, UnknownOption, "did you mean 'epilogue_fusion'"),
        ({"lowerings": "auto"}, UnknownOption, "did you mean 'lowering'"),
        ({"zzz": 1}, UnknownOption, "kasmina's own are lowering, strict"),
        ({"lowering": "triton"}, InvalidArgument, "this release has auto, dense, fused, matmul"),
        ({"disabled_passes": ["lower"]}, InvalidArgument, "there are unpin_tables"),
        ({"disabled_passes": "verify"}, InvalidArgument, "give a list"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_changes(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    model = OneLayer()
    with pytest.raises(error, match=message):
        kasminify(model, num_seeds=4, options=options)
    assert type(model.fc) is nn.Linear


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="max-autotune"):
        split_options("fastest", None)


def test_a_wrong_option_fails_the_first_call_of_torch_compile() -> None:
    run = torch.compile(OneLayer(), backend="kasmina", options={"strikt": True})
    with pytest.raises(Exception, match="did you mean 'strict'"):
        run(torch.randn(3, 8))


def test_debug_dir_gets_the_graph_before_and_after(tmp_path: Path) -> None:
    model = kasminify(OneLayer(), num_seeds=4, telemetry=False, options={"debug_dir": tmp_path})
    model(torch.randn(3, 8))
    before, after = (
        next(tmp_path.glob(f"*_{name}.py")).read_text() for name in ("before", "after")
    )
    assert "kasmina.blend" in before
    assert "kasmina" not in after.replace("kasmina_fx", "").replace("modules_kasmina", "")


def test_strict_fails_when_a_layer_was_not_rewritten() -> None:
    model, x = wrapped(OneLayer()), torch.randn(3, 8)
    graft(layer_of(model), [0], "mlp")
    lenient = RecordingBackend("eager", disabled_passes=["lower_blend", "eliminate_dormant"])
    torch.testing.assert_close(torch.compile(model, backend=lenient)(x), model(x))
    strict = RecordingBackend("eager", strict=True, disabled_passes=["lower_blend"])
    with pytest.raises(Exception, match=r"1 markers were not rewritten.*fc: .*quickest by pred"):
        torch.compile(model, backend=strict)(x)


def test_a_marker_that_nobody_rewrites_computes_the_same() -> None:
    model, x = wrapped(OneLayer(), telemetry=True), torch.randn(3, 8)
    graft(layer_of(model), [0, 1], "mlp")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), model(x))


def test_strict_raises_a_rewrite_error() -> None:
    from kasmina_fx import capture, rewrite
    from kasmina_fx.passes import passes_for

    gm = capture(_growing(), torch.randn(3, 8))
    with pytest.raises(RewriteError, match=r"a pass was disabled|quickest by prediction"):
        rewrite(gm, passes=passes_for(strict=True, disabled=["lower_blend"]))


def _growing() -> nn.Module:
    model = wrapped(OneLayer())
    graft(layer_of(model), [0], "mlp")
    return model


def test_an_unsupported_marker_is_left_and_said_so() -> None:
    from kasmina_fx import explain, rewrite

    class Wrong(nn.Module):
        def forward(self, y: Tensor, telemetry: Tensor) -> Tensor:
            torch.ops.kasmina.observe.default(y, None, telemetry, "dim=-1 runs=4x3")
            return y

    gm = torch.fx.symbolic_trace(Wrong())
    untouched = rewrite(gm)
    assert not untouched.modified
    assert untouched.graph_module is gm
    assert "no slots" not in str(explain(_growing(), torch.randn(3, 8)))
