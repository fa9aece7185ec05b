"""Decisions in a running cluster: telemetry from a stream, actions over HTTP, a rule underneath.

messages    what a scrape and an action look like, and which cluster they are of
broker      the stream: Redis; whatever it does is one transaction a scrape
decider     from scrapes to actions: latent states, the policy, the reactive rule
safety      what of a policy's wishes may be done
consumer    reads, decides, commits; goes on where it stopped
manifests   actions as KEDA and a Gateway take them
api, app    the HTTP application, and it on Ray Serve
simulated   a simulated cluster at the other end of the stream
"""
