"""Windows: shards on disk, views into them, batches, scalers, splits.

batch      the contract between data and models
manifest   what a dataset's manifest.json says; the chronological split
build      telemetry and dependencies → shards
calendar   time features: the clock, holidays, events
renames    instances that go on under another name
edges      the graph that is known at a window's origin
views      an open shard, whose windows are views
order      which windows each rank sees, and when
"""
