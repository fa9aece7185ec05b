"""Ray Data: nightly batch forecasts, fallback, publishing, and the report.

predict    one entity group: its last window → forecast rows, the naive where the model cannot be used
cold_start entities that have only just begun
run        the forecast job: all groups, the cluster's total, atomic publication
overview   what the report and the pages show of a forecast
hierarchy  levels that belong together: sums of the level below, reconciliation
levels     the same of whole forecasts: compared, judged, published once more
nightly    the main job: from new raw files to a published forecast and its report
"""
