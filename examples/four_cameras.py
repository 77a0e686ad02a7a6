"""One recogniser, four cameras: ``make demo``, or ``python examples/four_cameras.py``.

Read it from top to bottom; ``_cameras.py`` beside it has data and training, ``_show_cameras.py``
prints. A classifier of handwritten digits is trained and frozen. Three more cameras rotate, invert
or permute its pixels. Each gets a *pack* of seeds that is trained behind the frozen layers and
switched in when its images come; the original stays what it was, to the bit. At last one pack is
exported and run by a process that has no kasmina_fx.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _show_cameras as show
import torch
from _cameras import (
    BATCH,
    CAMERAS,
    HOST_LR,
    LR,
    OTHERS,
    Result,
    Samples,
    accuracy,
    classifier,
    learn,
    nothing_done,
    outputs,
    parameters_and_bytes,
    photograph,
)
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import SeedLifecycle, compiles, kasmina_layers, kasminify

parser = argparse.ArgumentParser(description="One recogniser, four cameras")
parser.add_argument("--replicates", type=int, default=3, help="splits and weights to average over")
parser.add_argument("--steps", type=int, default=400, help="for each new camera; the host: twice")
parser.add_argument("--png", type=Path, default=Path("four_cameras.png"), help="the picture")
args = parser.parse_args()
started, cpu_started = time.perf_counter(), time.process_time()
torch.set_num_threads(1)  # enough at this size, and steadier where other programs share the cores


def grow(model: nn.Module) -> None:
    """Give each seed a bottleneck of its own, which starts as the identity, in full use."""
    with kasmina_fx.transaction(model):
        for layer in kasmina_layers(model).values():
            seeds = range(layer.num_seeds)
            layer.request_germination(seeds, "bottleneck")
            layer.advance(seeds, SeedLifecycle.GRAFTING)
            layer.set_alpha(seeds, 1.0)


def train_packs(cameras: dict[str, Samples], seed: int) -> dict[str, Result]:
    """A pack for each camera, and how each does on all four; at last, all of them switched."""
    for name in packs.names():  # of the replicate before
        packs.activate(None)
        packs.delete(name)
    before = outputs(model, cameras["original"])
    for name in CAMERAS:
        packs.activate(None)  # the plain host
        grow(model)
        packs.capture(name)
        learn(model, cameras[name], args.steps, LR, seed)

    found = {}
    for name in CAMERAS:
        packs.activate(name)  # data: nothing recompiles
        scores = [accuracy(model, camera) for camera in cameras.values()]
        size = parameters_and_bytes([p for p in model.parameters() if p.requires_grad])
        found[f"pack {name}"] = Result(scores, None, *size)
    packs.activate(None)
    same = outputs(model, cameras["original"]).equal(before)
    own = [found[f"pack {name}"].accuracy[1 + i] for i, name in enumerate(CAMERAS)]
    switched = [accuracy(model, cameras["original"]), *own]
    return found | {"packs, switched": Result(switched, same, *size)}


@torch.no_grad()
def changes(camera: Samples) -> list[Tensor]:
    """How far each seed of the pack in use moves its chunk: rms, one for each seed of a layer."""
    found, images = [], camera.held_x
    for name, module in model.named_children():
        out = module(images)  # layer by layer, eagerly
        if name in kasmina_layers(model):
            with kasmina_fx.seeds_off(model, name):
                moved = (out - module(images)).unflatten(1, (module.num_seeds, -1))
            found.append(moved.square().mean((0, 2)).sqrt())
        images = out
    return found


RUN_ELSEWHERE = """
import sys
sys.modules["kasmina_fx"] = None  # `import kasmina_fx` raises ImportError
import torch
program = torch.export.load("model.pt2").module()
torch.save(program(torch.load("images.pt")), "answers.pt")
"""


def export(name: str, camera: Samples) -> show.Exported:
    """Make a plain model of the host and one pack, write it, and have another process run it."""
    packs.activate(name)
    final = kasmina_fx.finalize(model, growing="freeze", example_inputs=(camera.held_x,))
    dynamic = ({0: torch.export.Dim.DYNAMIC},)  # any batch
    program = torch.export.export(final, (camera.held_x[:2].clone(),), dynamic_shapes=dynamic)
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, f"{folder}/model.pt2")
        torch.save(camera.held_x, f"{folder}/images.pt")
        subprocess.run([sys.executable, "-I", "-c", RUN_ELSEWHERE], cwd=folder, check=True)
        answers = torch.load(f"{folder}/answers.pt")
        nbytes = Path(folder, "model.pt2").stat().st_size
    apart = float((answers - outputs(model, camera)).abs().max())
    right = 100 * float((answers.argmax(1) == camera.held_y).float().mean())
    return show.Exported(name, nbytes, apart, right)


# The network that holds packs: 4 seeds on each hidden layer, frozen hosts, compiled. It is the same
# object for all replicates, which load a host's weights: again data, so nothing is compiled anew.
model = kasminify(
    classifier(0), num_seeds=4, filter_fn=lambda _, name: name in ("0", "2"), telemetry=False
)
model.requires_grad_(False)
packs = kasmina_fx.packs(model)
results: list[dict[str, Result]] = []
seconds: list[float] = []  # of switches
show.setup(model, args.replicates)
for replicate in range(args.replicates):
    cameras = photograph(replicate)
    host = classifier(replicate)
    learn(host, cameras["original"], 2 * args.steps, HOST_LR, replicate)
    host.requires_grad_(False)
    model.load_state_dict(copy.deepcopy(host.state_dict()))
    of_packs = train_packs(cameras, replicate)
    rest = {
        name: way(host, cameras, args.steps, replicate)
        for name, way in {"nothing done": nothing_done, **OTHERS}.items()
    }
    results.append({"nothing done": rest.pop("nothing done"), **of_packs, **rest})
    show.replicate_done(replicate, results[-1], outputs(host, cameras["rotated"]))

moved = {}
for name in CAMERAS:
    start = time.perf_counter()
    packs.activate(name)
    seconds.append(time.perf_counter() - start)
    moved[name] = changes(cameras[name])
exported = export("rotated", cameras["rotated"])
show.pictures(cameras, moved)
show.png(args.png, cameras, moved)
show.table(results, BATCH * args.steps)
show.ending(exported, compiles(), seconds, args.png)
show.times(time.perf_counter() - started, time.process_time() - cpu_started)
