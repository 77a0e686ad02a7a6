"""What `criteria.py` checks beside time and memory: syncs, threads, parity."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from _findings import Finding
from _scaling import CHUNK, grown
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kasmina_fx import FeatureFlagManager, HybridKasminaLayer, KasminaLayer, SeedLifecycle, ab
from kasmina_fx.testing import graft

THREADS, SIXTEENTHS = 8, 16
#: Operators that hand a number of a tensor to the host, and so wait for the device.
SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")
MIX = (SeedLifecycle.TRAINING, SeedLifecycle.GRAFTING, SeedLifecycle.FOSSILIZED)


# Syncs.


class _Counting(TorchDispatchMode):
    """Counts the operators of `SYNCS` among all that run below it, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.syncs = 0, Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.all += 1
        self.syncs.update([name] if name in SYNCS else [])
        return func(*args, **kwargs or {})


def mixed(seeds: int, device: str) -> tuple[nn.Module, KasminaLayer, Tensor]:
    """A model of which a quarter of the seeds is at each of `MIX`, the others asleep."""
    torch.manual_seed(0)
    layer = KasminaLayer(nn.Linear(64, CHUNK * seeds), seeds)
    for place, stage in enumerate(MIX):
        graft(layer, range(place, seeds, 4), "mlp", 0.5, stage)
    model = nn.Sequential(layer, nn.GELU(), nn.Linear(CHUNK * seeds, 8)).to(device)
    return model, layer, torch.randn(32, 64, device=device)


def syncs(seeds: int, device: str) -> Iterator[Finding]:
    """What waits for the device in a training step with statistics."""
    model, _, x = mixed(seeds, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="kasmina")

    def step(run: Callable[[Tensor], Tensor]) -> None:
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step(model), step(compiled)
    for name, run in (("eager", model), ("compiled", compiled)):
        if device == "cuda":
            found, waits = _refused_by_cuda(lambda run=run: step(run))
        elif name == "eager":
            with _Counting() as mode:
                step(run)
            found = f"{mode.syncs.total()} of {mode.all} operators"
            waits = mode.syncs.total()
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                step(run)
            keys = [event.name.partition("::")[2] for event in seen.events()]
            waits = sum(key in SYNCS for key in keys)
            found = f"{waits} of {len(keys)} profiled events"
        how = {"cuda": "sync debug mode", "cpu": "counted: .item(), nonzero and the like"}
        yield Finding(
            f"no sync in a step, {name}, {seeds:,} seeds in {len(MIX)} stages",
            found,
            how[device],
            "0",
            waits == 0,
        )


def _refused_by_cuda(step: Callable[[], None]) -> tuple[str, int]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).partition("\n")[0], 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none raised", 0


# Threads.


class Undo(Exception):
    """What some transactions raise halfway."""


class Crowd:
    """Threads that change the same two seeds, and threads that look.

    The alphas are k/16 and 1 - k/16, exact numbers; a blueprint adds 1 to each chunk. So what both
    add to the output is 1 at any moment, whoever wrote last.
    """

    def __init__(self, rounds: int, device: str) -> None:
        self.rounds, self.layer = rounds, grown(2, device, active=False)
        graft(self.layer, [0, 1], "affine", 0.5)
        with torch.no_grad():
            for bank in self.layer.kasmina.banks.values():
                for spec, stack in zip(bank.tensor_specs, bank.tensors(), strict=True):
                    stack.fill_(1.0 if spec.name in ("scale", "shift") else 0.0)
        self.race = grown(rounds, device, active=False)  # who germinates each of these first
        self.x = torch.zeros(1, 2 * CHUNK, device=device)
        self.done, self.won = Counter[str](), list[int]()
        self.torn, self.errors = list[float](), list[str]()

    def run(self) -> None:
        half = THREADS // 2
        jobs = [partial(self._write, random.Random(n)) for n in range(half)] + [self._read] * half
        threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _write(self, chance: random.Random) -> None:
        for turn in range(self.rounds):
            k, fails = chance.randrange(SIXTEENTHS + 1), chance.random() < 0.3
            with suppress(Undo), self.layer.transaction():
                self.layer.set_alpha(0, k / SIXTEENTHS)
                time.sleep(0)  # another thread may run now
                if fails:
                    raise Undo
                self.layer.set_alpha(1, 1.0 - k / SIXTEENTHS)
            self.done["undone" if fails else "changed"] += 1
            if self.race.request_germination(turn, "affine"):
                self.won.append(turn)

    def _read(self) -> None:
        for _ in range(self.rounds):
            with torch.no_grad():
                added = self.layer(self.x)
            total = float(added[0, 0] + added[0, CHUNK])
            self.done["read"] += 1
            if total != 1.0:
                self.torn.append(total)

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self.errors.append(repr(error))


def atomic(rounds: int, device: str) -> Iterator[Finding]:
    """No forward and no survivor may see half a change, and each seed germinates once."""
    crowd = Crowd(rounds, device)
    crowd.run()
    done, won = crowd.done, crowd.won
    last = sum(crowd.layer.state.alphas.tolist())
    yield Finding(
        f"atomic updates under {THREADS} threads",
        f"{len(crowd.torn)} torn, {len(crowd.errors)} errors",
        f"{done['changed']:,} changes, {done['undone']:,} undone, {done['read']:,} forwards",
        "0",
        not crowd.torn and not crowd.errors and last == 1.0,
    )
    yield Finding(
        f"one winner a seed: {THREADS // 2} threads germinate {rounds:,} seeds",
        f"{len(won):,} wins, {len(set(won)):,} seeds",
        "each thread asks for all",
        f"{rounds:,}",
        sorted(won) == list(range(rounds)),
    )


# Parity.


def parity(steps: int, device: str) -> Iterator[Finding]:
    """`kasmina_fx.ab.compare` on a model of two hybrid layers with seeds in three stages."""
    torch.manual_seed(0)
    flags = FeatureFlagManager("no_such_file.json")
    model = nn.Sequential(
        HybridKasminaLayer(nn.Linear(16, 48), "first", 16, feature_flags=flags),
        nn.GELU(),
        HybridKasminaLayer(nn.Linear(48, 32), "second", 8, feature_flags=flags),
    ).to(device)
    for layer in (model[0], model[2]):
        for place, stage in enumerate(MIX):
            graft(layer, range(place, layer.num_seeds, 4), "mlp", 0.5, stage)
    x = torch.randn(64, 16, device=device)
    report = ab.compare(model, x, steps=steps, compile=True)
    for name in ("outputs", "gradients", "loss"):
        apart: ab.Difference = getattr(report, name)
        yield Finding(
            f"parity of A/B, {name} of {steps} steps, chunked compiled",
            f"{apart.largest:.1e}",
            f"mean {apart.mean:.0e}",
            f"<= {apart.allowed:.1e}",
            apart.holds,
        )
