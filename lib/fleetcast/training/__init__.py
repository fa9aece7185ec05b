"""Ray Train: the loop, DDP, checkpoints.

options   what training can be told
loop      one process: epochs, loss, validation, checkpoints; plain torch
run       the whole job: workers, resumption, the saved model
"""
