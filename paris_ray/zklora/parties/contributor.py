"""The contributor's service: it answers users within the budget, proves, and releases the key."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from paris_ray.errors import ParisError
from paris_ray.zklora.offer import load_offer
from paris_ray.zklora.parties.gateway import LoRAGateway, Service
from paris_ray.zklora.parties.workers import LoRAWorker, result

__all__ = ["Contribution", "Service"]


class Contribution:
    """A service that runs until it is closed.

    Args:
        service: How to serve the offer in its folder.

    Attributes:
        address: Host and port that it listens on.

    Raises:
        ParisError: if the offer cannot be served so.
    """

    def __init__(self, service: Service) -> None:
        offer = load_offer(service.folder)
        openings = self._openings = ray.put(offer.openings())  # kept: an actor may be restarted
        actors: Any = (LoRAWorker, LoRAGateway)
        worker, gateway = actors
        self._workers = [worker.remote(openings) for _ in range(service.workers)]
        # Its address is one of this machine, and the journal a file here.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.gateway = gateway.options(scheduling_strategy=here).remote(
            service, self._workers, [openings]
        )
        try:
            self.address: tuple[str, int] = result(self.gateway.start.remote())
        except BaseException:
            self.close()
            raise

    def news(self) -> list[str]:
        """Return a line for people for each thing that happened since this was last asked."""
        return list(result(self.gateway.news.remote()))

    def status(self) -> str:
        """Return rows left and sessions, in one line for people."""
        try:
            self.address = result(self.gateway.start.remote())  # tried again, after it was replaced
        except ParisError as error:
            return f"not listening: {error}"
        return str(result(self.gateway.status.remote()))

    def close(self) -> None:
        """Stop the service; sessions, budget and offer stay as they are."""
        for actor in (self.gateway, *self._workers):
            ray.kill(actor)
