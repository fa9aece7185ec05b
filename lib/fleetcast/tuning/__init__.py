"""Ray Tune: the papers' sensitivity grids.

grids     which studies there are, and what a point changes
options   what the job can be told
trials    many trials of one backtest's kind on Ray Tune, which share one copy of their data
run       the whole job: points, trials, the page
"""
