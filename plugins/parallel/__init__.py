"""One model on several ranks: `parallel.tp=N parallel.pp=M`. docs/parallel.md tells how it works.

config.py     what the `parallel` node says beside the numbers of ranks
mesh.py       who this rank is; collectives that know how long to wait and what they wait for
tensor.py     a plan over module names: what each rank holds of every matrix
pipeline.py   a cut over layers, and what a stage does differently
symmetric.py  products and their sums over memory that GPUs map into each other
channel.py    one connection between the driver and a rank: kinds and sizes
messages.py   what driver and rank say to each other: no body names code
store.py      where collectives' addresses are exchanged, over such a connection
launch.py     starts ranks, watches them, says which one failed and why
start.py      where a rank that the driver started begins, before torch is imported
torchrun.py   how ranks that torchrun started find the driver, and the key that they share
handshake.py  who is let in: a proof of the key in both directions
execution.py  the real executor's Execution, on a rank and on the driver
worker.py     the main loop of every rank but the driver's
"""

from __future__ import annotations

from headway import Registry, hookimpl

from .config import MeshConfig


@hookimpl
def headway_register(registry: Registry) -> None:
    registry.add("parallel", "mesh", MeshConfig)
