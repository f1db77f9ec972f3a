"""Serve applications that do what Ray's proxy has to answer for: wait, die, refuse."""

import asyncio
import os
from pathlib import Path

from ray import serve
from ray.serve import Application
from starlette.requests import Request


class Misbehaving:
    """Waits as long as it is told, counts who gave up on it, and dies on demand.

    With `die` it always does; with `life`, where that file is there, and then it is not any more.
    """

    def __init__(self) -> None:
        self.cancelled = 0

    async def __call__(self, request: Request) -> object:
        body = (await request.body()).decode()
        if "die" in request.query_params:
            os._exit(1)
        if "life" in request.query_params:
            life = Path(request.query_params["life"])
            if life.exists():
                life.unlink()
                os._exit(1)
        try:
            await asyncio.sleep(float(request.query_params.get("seconds", 0)))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return {"cancelled": self.cancelled, "headers": dict(request.headers), "body": body}


def build(args: dict[str, int]) -> Application:
    """Return the application; `args` are options of its deployment."""
    deployment = serve.deployment(Misbehaving).options(ray_actor_options={"num_cpus": 0.1}, **args)
    return deployment.bind()
