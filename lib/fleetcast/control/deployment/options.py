"""What the deployment of decisions can be told: `args` of deploy/control/serve.yaml."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, ValidationError

from fleetcast.config import Options, S3Options
from fleetcast.control.deployment.broker import RedisStreams
from fleetcast.control.deployment.decider import Decider, DeciderOptions
from fleetcast.control.deployment.messages import Description
from fleetcast.errors import InputError
from fleetcast.store import Store, use_s3

#: The cluster's description in the store.
CLUSTER = "control/cluster.json"


class DeployOptions(Options):
    """From a stream of telemetry to actions over HTTP."""

    store: str
    """The store with the cluster's description, and the agent."""
    s3: S3Options = S3Options()
    """How `s3://` is reached."""
    redis_variable: str = "FLEETCAST_REDIS"
    """Environment variable that holds Redis's URL, redis://[:password@]host:port/0: passwords stand in no
    file."""
    prefix: str = Field("fleetcast", pattern=r"^[A-Za-z0-9_.-]+$")
    """Of the streams' names."""
    most: int = Field(100_000, ge=1000)
    """Entries of each stream that are kept."""
    decide: DeciderOptions = DeciderOptions()
    """Who decides, and how far it may go."""
    clock: Literal["wall", "trace"] = "wall"
    """What age telemetry has: by the server's clock, or, of a trace of the past, since it came."""
    stale: float = Field(120, gt=0)
    """Without telemetry for so long [s], KEDA and the router get no answer, and fall back to their own."""
    token_variable: str | None = "FLEETCAST_CONTROL_TOKEN"
    """Environment variable that holds a bearer token; if it is set, every request but health checks needs
    `Authorization: Bearer …`. Without one nobody may turn the kill switch over HTTP."""
    port: int = Field(80, ge=1, le=65535)
    """Of the services' backends, in routes."""
    gateway: str = "gateway"
    """The Gateway that routes belong to."""

    def broker(self) -> RedisStreams:
        """The stream. Raises InputError if the variable is not set, or Redis does not answer."""
        url = os.environ.get(self.redis_variable, "")
        if not url:
            raise InputError(
                f"redis_variable: {self.redis_variable} is not set, expected redis://host:port/0"
            )
        return RedisStreams(url, self.prefix, self.most)

    def decider(self) -> Decider:
        """Who decides. Raises InputError if the description or the agent is missing."""
        use_s3(self.s3)
        store = Store(self.store)
        return Decider(self.description(store), self.decide, store)

    def description(self, store: Store) -> Description:
        """The cluster that telemetry is of."""
        found = store.read_json(CLUSTER)
        if found is None:
            raise InputError(f"{store.uri}/{CLUSTER}: no such file, expected the cluster's description")
        try:
            return Description.model_validate(found)
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"])) or "it"
            raise InputError(f"{store.uri}/{CLUSTER}: {place}: {wrong['msg']}") from error

    def token(self) -> bytes:
        """The token; empty if there is none."""
        return os.environ.get(self.token_variable or "", "").encode()
