"""Ray Serve: published forecasts and live ones over HTTP, for people, autoscalers and Prometheus.

options     what the server can be told
schemas     requests and answers
past        what came before a forecast, and the graph at its beginning
snapshot    a published forecast in memory, and what can be asked of it; replaced as a whole by a newer one
live        forecasts from telemetry in the request or in the state cache
source      which forecast and which model are served now
answers     from a snapshot or a live answer to what schemas says
prometheus  the same numbers for Prometheus and Grafana
service     what the routes ask for forecasts
routes, prometheus_routes
api         the HTTP application: limits, errors, the page
app         the deployments on Ray Serve; local, the server without it
page/       the page at /
"""
