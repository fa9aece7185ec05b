"""How good a forecast is: mergeable scores, the naive rungs beside it, calibrated intervals, the report.

Everything that is counted here is a (sum, count) state or an integer histogram that adds up, so a figure does
not depend on batch size, number of workers or order.
"""
