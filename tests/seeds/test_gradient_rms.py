"""The root mean square of the gradients by a layer's outputs, in its reports."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from gradient_cases import (
    ON,
    assert_rms,
    expected_rms,
    gradients_of,
    layers_of,
    loss_of,
    net,
    rms_of,
)
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
    TelemetryPolicy,
    follow_scaler,
    health_report,
    kasminify,
    unobserved,
)
from kasmina_fx.testing import graft

NOTHING = [torch.nan] * 3


def known(model: nn.Module) -> bool:
    """Whether all layers have seen a gradient, or (False) none has."""
    (said,) = {bool(seen) for rms in rms_of(model) for seen in ~rms.isnan()}
    return said


@pytest.mark.parametrize("telemetry", [True, TelemetryPolicy(every=2), False])
def test_it_is_off_by_default(telemetry: bool | TelemetryPolicy) -> None:
    model, on = net(telemetry), net()
    loss_of(model(torch.randn(4, 5))).backward()
    assert not known(model)
    assert model.state_dict().keys() == on.state_dict().keys()
    buffers = {name for name, _ in model.named_buffers()}
    more = {name for name, _ in on.named_buffers()} - buffers
    assert more == {f"{i}.kasmina.telemetry.gradients" for i in (0, 2)}


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (3, 500, 5)])
def test_it_equals_a_float64_reference(growing: bool, shape: tuple[int, ...]) -> None:
    model = net()
    if growing:
        graft(layers_of(model)[0], [0, 2], "mlp", 0.7)
        graft(layers_of(model)[1], 1, "affine", 1.0)
    steps = [torch.randn(shape) for _ in range(3)]
    expected = [gradients_of(model, x) for x in steps]
    for x in steps:
        loss_of(model(x)).backward()
    for found, gradients in zip(rms_of(model), zip(*expected, strict=True), strict=True):
        assert_rms(found, expected_rms(gradients))
    by_name = health_report(model)["2"]["gradient_rms"]
    assert torch.equal(by_name, rms_of(model)[1])


def test_it_looks_at_what_the_policy_says() -> None:
    model = net(TelemetryPolicy(gradients=True, rows=8, every=2))
    steps = [torch.randn(n, 5) for n in (20, 3, 9, 8)]
    expected = [gradients_of(model, x) for x in steps[::2]]
    for x in steps:
        loss_of(model(x)).backward()
    for found, gradients in zip(rms_of(model), zip(*expected, strict=True), strict=True):
        assert_rms(found, expected_rms(gradients, rows=8))


def test_features_of_a_convolution_are_along_dim_1() -> None:
    torch.manual_seed(0)
    conv = kasminify(
        nn.Conv2d(3, 4, 3), targets=(nn.Conv2d,), num_seeds=2, telemetry=ON, compile=False
    )
    weight = torch.randn(2, 4, 6, 6)
    (conv(torch.randn(2, 3, 8, 8)) * weight).sum().backward()
    assert isinstance(conv, KasminaLayer)
    expected = weight.double().unflatten(1, (2, 2)).square().mean((0, 2, 3, 4)).sqrt()
    assert_rms(conv.get_health_report()["gradient_rms"], expected)


@pytest.mark.parametrize("frozen", ["first", "both", "but input"])
def test_a_frozen_host_is_seen_where_its_output_needs_a_gradient(frozen: str) -> None:
    model = net()
    first, _ = layers_of(model)
    (first if frozen == "first" else model).requires_grad_(False)
    x = torch.randn(4, 5, requires_grad=frozen == "but input")
    out = model(x)
    assert out.requires_grad == (frozen != "both")
    if out.requires_grad:
        loss_of(out).backward()
    seen = [not bool(rms.isnan().any()) for rms in rms_of(model)]
    assert seen == [frozen == "but input", frozen != "both"]


def test_nothing_is_seen_without_a_backward_or_where_nothing_is_kept() -> None:
    model, x = net(), torch.randn(4, 5)
    model(x)
    with torch.no_grad():
        model(x)
    loss_of(model.eval()(x)).backward()
    model.train()
    with unobserved(model):
        loss_of(model(x)).backward()
    torch.autograd.grad(loss_of(model(x)), list(model.parameters()))  # adds to no leaf
    assert not known(model)
    watching = net(TelemetryPolicy(gradients=True, in_eval=True)).eval()
    loss_of(watching(x)).backward()
    assert known(watching)


def test_a_policy_may_come_and_go() -> None:
    model, x = net(True), torch.randn(4, 5)
    keys = model.state_dict().keys()
    before: bool | TelemetryPolicy = True
    for policy in (ON, ON, True, ON, False):
        for layer in layers_of(model):
            layer.set_telemetry(policy)
        assert known(model) == (policy is ON and before is ON)
        loss_of(model(x)).backward()
        assert known(model) == (policy is ON)
        before = policy
    assert model.state_dict().keys() == keys


def test_seeds_that_germinate_and_reports_forget_nothing_and_reset_does() -> None:
    model, x = net(TelemetryPolicy(gradients=True, every=2)), torch.randn(4, 5)
    loss_of(model(x)).backward()
    before = rms_of(model)
    graft(layers_of(model)[0], 0, "affine", 0.0)
    assert all(map(torch.equal, rms_of(model), before))
    for layer in layers_of(model):
        layer.kasmina.telemetry.reset()
    assert not known(model)
    loss_of(model(x)).backward()
    assert known(model)


def test_copies_casts_and_checkpoints() -> None:
    model, x = net(), torch.randn(4, 5)
    loss_of(model(x)).backward()
    before = rms_of(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, rms_of(copied), before))
        loss_of(copied(x)).backward()
        for found, same in zip(rms_of(copied), before, strict=True):
            assert_rms(found, same.double())
        copied.bfloat16()
        loss_of(copied(x.bfloat16())).backward()
        for found, close in zip(rms_of(copied), before, strict=True):
            assert_rms(found, close.double(), rtol=0.02)
    plain = net(True)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert all(map(torch.equal, rms_of(model), before))
    loss_of(model(x)).backward()
    for found, same in zip(rms_of(model), before, strict=True):
        assert_rms(found, same.double())


def test_a_layer_that_changes_its_features_goes_on_looking_as_often() -> None:
    model = net(TelemetryPolicy(gradients=True, every=2))
    last: Any = model[2]
    last.weight, last.bias = nn.Parameter(torch.randn(9, 7)), nn.Parameter(torch.zeros(9))
    last.out_features = 9
    loss_of(model(torch.randn(4, 5))).backward()
    assert known(model)
    counts = []
    for _ in range(3):
        loss_of(model(torch.randn(4, 5))).backward()
        counts.append(last.get_health_report()["count"].tolist())
    assert counts[0] == [12.0] * 3
    assert counts[1] == counts[2] == [24.0] * 3


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_graph_of_the_gradient_counts_once() -> None:
    model, x = net(), torch.randn(4, 5)
    gradients = gradients_of(model, x)
    for _ in range(2):
        loss_of(model(x)).backward(create_graph=True)
        model.zero_grad()
    for found, mine in zip(rms_of(model), gradients, strict=True):
        assert_rms(found, expected_rms([mine]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_seen_once(reentrant: bool) -> None:
    model = net()
    x = torch.randn(4, 5, requires_grad=True)
    gradients = gradients_of(model, x.detach())
    out: Tensor = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    loss_of(out).backward()
    for layer, found, mine in zip(layers_of(model), rms_of(model), gradients, strict=True):
        assert_rms(found, expected_rms([mine]))
        assert layer.kasmina.telemetry.gradients is not None
        assert layer.kasmina.telemetry.gradients[2].tolist() == [1, 1, 1]


def test_the_scale_of_a_named_scaler_is_undone_though_all_seeds_are_dormant() -> None:
    model, x = net(), torch.randn(4, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss_of(model(x)).backward()
    follow_scaler(model, scaler)
    assert not known(model)  # of another scale, for all that was known
    scaler.scale(loss_of(model(x))).backward()
    for found, mine in zip(rms_of(model), gradients_of(model, x), strict=True):
        assert_rms(found, expected_rms([mine]))
    follow_scaler(model, scaler)
    assert known(model)


def test_a_scaler_that_is_learnt_starts_anew() -> None:
    model, x = net(), torch.randn(4, 5)
    graft(layers_of(model)[0], 0, "affine", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        expected = gradients_of(model, x)
        scaler.scale(loss_of(model(x))).backward()
        if step == 1:
            for found, mine in zip(rms_of(model), expected, strict=True):
                assert_rms(found, expected_rms([mine]))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert known(model) == (step > 0)
