"""Ray Data: many raw files → telemetry, entities, dependencies and rejected rows; then window shards.

files     finds the raw files and reads them as blocks of lines
chunks    one task: raw rows of a chunk → parts                   (map)
run       the whole job: what is new, what is stale, what is complete
"""
