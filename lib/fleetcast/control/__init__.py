"""Decisions: a simulated cluster of services, and the policies that scale, route and restart in it."""
