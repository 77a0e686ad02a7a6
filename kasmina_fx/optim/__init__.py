"""Optimizers of models that grow.

An optimizer that holds a layer's stacked parameters needs no call for most of what happens to them:
importing :mod:`kasmina_fx` registers two hooks that torch runs around every ``step()``
(:mod:`kasmina_fx.optim.hooks`). With them

- slots whose seeds may not learn stay as they are to the bit, whatever momentum and weight decay
  would do to them;
- a stack that outgrew its capacity is followed to the larger one, its state with it;
- a slot given to a new seed starts with empty state;
- ramps with ``SeedConfig(ramp_every="step")`` make their step;
- a slot moves as far as its own age says, where an optimizer counts steps (Adam and its like).

One thing is left to the caller: stacks that did not exist when the optimizer was made, those of a
blueprint's first germination. :func:`follow`, called once, adds them before each step; :func:`sync`
adds those of now:

    >>> import torch
    >>> from kasmina_fx import kasmina_layers, kasminify
    >>> model = kasminify(torch.nn.Sequential(torch.nn.Linear(4, 8)), num_seeds=4, compile=False)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> kasmina_layers(model)["0"].request_germination([1, 2], "affine")
    True
    >>> print(sync(optimizer, model))
    added to group 0: 0.kasmina.banks.affine_run0.scale (2 slots)
    added to group 0: 0.kasmina.banks.affine_run0.shift (2 slots)
    >>> print(sync(optimizer, model))
    nothing to carry or add
"""

from kasmina_fx.optim import hooks
from kasmina_fx.optim.following import follow
from kasmina_fx.optim.sync import Added, Carried, SyncReport, sync

hooks.register()

__all__ = ["Added", "Carried", "SyncReport", "follow", "sync"]
