"""Ray Train: the loop, DDP, checkpoints.

options   what training can be told
loop      one process: epochs, loss, validation, checkpoints; plain torch
run       the whole job: workers, resumption
evaluate  a model beside the naive rungs, as tasks over windows
register  the evaluated model in the store, and which one is served
"""
