"""Ray Tune: the papers' sensitivity grids, and the search for a model's options.

grids     which studies there are, and what a point changes
options   what the job can be told
trials    many trials of one backtest's kind on Ray Tune, which share one copy of their data
spaces    what a search may change
search    Optuna with ASHA, or PBT, on the validation part
run       the whole job: points, trials, the page
"""
