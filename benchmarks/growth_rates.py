"""Which learning rate each way of adapting takes in `growth.py`.

    python benchmarks/growth_rates.py

Accuracy on the three shifted conditions, of two replicates that `growth.py` does not measure, for
learning rates from 1e-3 to 1e-1. A way takes the rate that is best on average over all of them.
"""

from __future__ import annotations

import statistics

import torch
from _growth_adapting import fine_tuned, seeds_alone, with_head, with_lora
from _growth_data import CONDITIONS, Digits, Scale, wide_host

RATES, REPLICATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (100, 101)
WAYS = {
    "`bottleneck`, 4 chunks a layer": seeds_alone,
    "head only": with_head,
    "LoRA of `peft`, hidden layers": with_lora(["0", "2"], 20),
    "LoRA of `peft`, all layers": with_lora(["0", "2", "4"], 15),
    "full fine-tuning": fine_tuned,
}


def main() -> None:
    torch.set_num_threads(1)
    scale = Scale()
    print(f"| way | rate | {' | '.join(CONDITIONS)} | mean |\n|---|---:|---:|---:|---:|---:|")
    for name, way in WAYS.items():
        for rate in RATES:
            means = []
            for condition in CONDITIONS:
                found = [
                    way(wide_host(r, scale), Digits.of(r).shifted(condition), scale, r, lr=rate)
                    for r in REPLICATES
                ]
                means.append(statistics.mean(found))
            cells = " | ".join(f"{mean:.1f}" for mean in (*means, statistics.mean(means)))
            print(f"| {name} | {rate:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
