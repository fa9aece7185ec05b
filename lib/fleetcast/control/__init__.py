"""Decisions: a simulated cluster of services, and the policies that scale, route and restart in it.

queueing     closed forms
cluster      services, calls, classes of requests, nodes
traffic      rates of requests over time
pods         the life of replicas and nodes, the same in both engines
measuring    what an autoscaler sees, the same in both engines
events       the event-driven engine: every request
engine       the vectorised engine: many environments (stations: a replica's law; paths: the call graph)
interface    what policies see and do, and what comes of it
features     what an agent sees, in training and live
environment  the cluster for reinforcement learning
measures     what a run is judged by
policies     rules that scale, and their calibration
bidrl        the learned agent
experiments  those of the paper, from one command each
deployment   decisions in a running cluster: a stream, HTTP, three modes
what_if      published forecasts against what came
"""
