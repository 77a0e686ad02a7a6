"""An experiment of `growth.py`: where to grow, when there is room for a quarter of the chunks."""

from __future__ import annotations

import copy

import torch
from _growth_adapting import Scores, learn, seeded
from _growth_data import Digits, Scale, accuracy, generator, is_hidden, wide_host
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_fx import TelemetryPolicy, kasmina_layers, kasminify
from kasmina_fx.testing import graft

#: Chunks of 8 features a hidden layer, and how many of all 32 grow.
CHUNKS, GROWN = 16, 8


def reports(host: nn.Module, data: Digits) -> dict[str, Tensor]:
    """What statistics say of all chunks of the host, layer after layer, on the data to learn."""
    model = kasminify(
        copy.deepcopy(host),
        num_seeds=CHUNKS,
        filter_fn=is_hidden,
        telemetry=TelemetryPolicy(gradients=True, rows=None),
        compile=False,
    )
    F.cross_entropy(model(data.train_x), data.train_y).backward()
    each = [layer.get_health_report() for layer in kasmina_layers(model).values()]
    return {name: torch.cat([one[name] for one in each]) for name in ("health", "gradient_rms")}


def at_random(seed: int) -> Tensor:
    return torch.randperm(2 * CHUNKS, generator=generator(seed))[:GROWN]


def within_layers(chosen: Tensor, seed: int) -> Tensor:
    """As many of each layer as were chosen there, at random."""
    draws, found = generator(seed), []
    for layer in range(2):
        count = int((chosen // CHUNKS == layer).sum())
        found.append(layer * CHUNKS + torch.randperm(CHUNKS, generator=draws)[:count])
    return torch.cat(found)


def grown(host: nn.Module, chosen: Tensor, data: Digits, scale: Scale, seed: int) -> float:
    """Accuracy once the chosen chunks of a frozen copy have a bottleneck that has learnt."""
    model = seeded(host, CHUNKS)
    for number, layer in enumerate(kasmina_layers(model).values()):
        mine = chosen[chosen // CHUNKS == number] % CHUNKS
        if len(mine):
            graft(layer, mine.tolist(), "bottleneck", 1.0)
    learn(model, data, scale, seed)
    return accuracy(model, data)


def choosing(replicate: int, scale: Scale) -> Scores:
    """Chunks by what statistics say of them, beside chunks at random."""
    host, data = wide_host(replicate, scale), Digits.of(replicate).shifted("rotated")
    said = reports(host, data)
    by_gradient = said["gradient_rms"].topk(GROWN).indices
    ways = {
        "at random": at_random(replicate),
        "lowest health": said["health"].topk(GROWN, largest=False).indices,
        "largest gradient (rms)": by_gradient,
        "as many of each layer, at random": within_layers(by_gradient, replicate),
    }
    scores = {name: grown(host, chosen, data, scale, replicate) for name, chosen in ways.items()}
    return {f"{GROWN} of {2 * CHUNKS} chunks, rotated": scores}
