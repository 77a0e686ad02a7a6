"""What each of two processes does, run as ``python rank_cases.py SCENARIO RANK FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kasmina_fx import RanksDiffer, kasmina_layers, kasminify
from kasmina_fx.seeds import ranks
from kasmina_fx.testing import graft

X = torch.linspace(-1, 1, 8).view(2, 4)


def net(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = nn.Sequential(nn.Linear(4, 6))
    kasminify(made, num_seeds=3, compile=False, **settings)
    return made


def run(scenario: str, rank: int) -> str:
    model = net(compare_ranks=scenario != "not compared")
    layer = kasmina_layers(model)["0"]
    model(X)
    torch.manual_seed(rank)  # as data loaders want it
    if scenario == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(X).sum().backward()
        graft(layer, [0], "mlp")
        wrapped(X)
    elif scenario == "ddp, reserved":
        layer.reserve(2, "mlp")
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            if step == 1:
                graft(layer, [0, 1], "mlp")
            optimizer.zero_grad()
            wrapped(torch.randn(2, 4)).square().sum().backward()
            optimizer.step()
        return f"{sum(float(p.double().sum()) for p in model.parameters()):.9f}"
    elif scenario == "other seeds":
        graft(layer, [rank], "mlp")
        model(X)
    elif scenario in ("rank 0 alone", "rank 1 alone"):
        ranks.WAITS = 3.0  # type: ignore[misc]
        if scenario == f"rank {rank} alone":
            graft(layer, [0], "mlp")
        model(X)
    else:
        graft(layer, [0], "mlp")
        values = model(X)
        return f"{float(values.double().sum()):.9f}"
    return "no error"


def main(scenario: str, rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        said = run(scenario, rank)
    except RanksDiffer as error:
        said = str(error)
    (folder / f"said_{rank}").write_text(said)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
