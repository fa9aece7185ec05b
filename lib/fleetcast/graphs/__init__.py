"""How records become dependency edges, and how a graph is sparsified and cut into groups of entities.

An edge frame has the columns of `dependencies.SCHEMA`; load propagates from `source` to `target`.
"""
