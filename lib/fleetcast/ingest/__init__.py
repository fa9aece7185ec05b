"""Ray Data: many raw files → telemetry, entities, dependencies and rejected rows; then window shards.

files     finds the raw files and reads them as blocks of lines
chunks    one task: raw rows of a chunk → partial products        (map)
combine   one task: the parts of one day → telemetry              (reduce)
run       the whole job: what is new, what is stale, what is complete
"""
