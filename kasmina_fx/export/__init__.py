"""The way out: a plain model of one that has grown, that runs where this package is not.

:mod:`~kasmina_fx.export.finalizing` is the call, :mod:`~kasmina_fx.export.grown` what it makes of
blueprints that fold into no weight.
"""
