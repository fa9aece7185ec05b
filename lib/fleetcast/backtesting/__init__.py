"""Backtests: models × seeds × data sets as Ray tasks, and the report that compares them.

data      what a data set is made of, and its windows
options   what a backtest can be told
plan      which trials that makes; the papers' experiments
trial     one model, seed and data set: search, fit, evaluation; plain torch
run       the whole job: tasks, resumption, the report
"""
