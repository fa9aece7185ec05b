"""The deployment on Ray Serve: one replica that reads the stream and answers HTTP. `build` is what
deploy/control/serve.yaml names."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from ray import serve

from fleetcast.control.deployment.api import application
from fleetcast.control.deployment.consumer import Consumer
from fleetcast.control.deployment.options import DeployOptions
from fleetcast.errors import InputError
from fleetcast.runtime import set_up_logging


@serve.ingress()
class Control:
    """Decides, and tells what was decided."""

    def __init__(self, options: dict[str, Any]) -> None:
        set_up_logging("INFO")
        torch.set_num_threads(1)
        self.options = DeployOptions(**options)
        self.consumer = Consumer(self.options.broker(), self.options.decider())
        self.consumer.start()

    def __serve_build_asgi_app__(self) -> Any:
        return application(self.consumer, self.options)

    def check_health(self) -> None:
        """Ray Serve restarts a replica whose loop has ended."""
        if not self.consumer.alive:
            raise RuntimeError("the loop has ended")


def build(args: dict[str, Any]) -> serve.Application:
    """The application of `args`. Raises InputError naming a wrong one."""
    try:
        options = DeployOptions(**args)
    except ValidationError as error:
        wrong = (f"args.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InputError("; ".join(wrong)) from error
    made = serve.deployment(name="Control", num_replicas=1, ray_actor_options={"num_cpus": 0.5})(Control)
    return made.bind(options.model_dump(mode="json"))
