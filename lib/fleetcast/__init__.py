"""fleetcast: forecasts of the load of every machine and service of a cluster."""

__version__ = "0.1.0"
