"""One model on several ranks: `parallel.tp=N parallel.pp=M`. docs/parallel.md tells how it works.

mesh.py       who this rank is; collectives that know how long to wait and what they wait for
tensor.py     a plan over module names: what each rank holds of every matrix
pipeline.py   a cut over layers, and what a stage does differently
symmetric.py  products and their sums over memory that GPUs map into each other
channel.py    what the driver and a rank say to each other, in bytes
launch.py     starts ranks, watches them, says which one failed and why
execution.py  the real executor's Execution, on a rank and on the driver
worker.py     the main loop of every rank but the driver's
"""
