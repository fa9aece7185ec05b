"""Ray Serve: published forecasts and live ones over HTTP, for people, autoscalers and Prometheus.

options     what the server can be told
schemas     requests and answers
snapshot    a published forecast in memory, and what can be asked of it; replaced as a whole by a newer one
live        forecasts from telemetry in the request or in the state cache
prometheus  the same numbers for Prometheus and Grafana
api         the HTTP application: routes, errors, limits, the page
app         the deployments on Ray Serve
page/       the page at /
"""
