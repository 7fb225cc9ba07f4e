"""A router for fleets with many models: requests for one model go to one instance while loads are even.

Each model has a home by rendezvous hashing (Thaler and Ravishankar, IEEE/ACM ToN 1998), so an instance that comes or
goes moves only the models that it had. Knows instance ids and models; must not know which weights are where.
"""

from __future__ import annotations

from collections.abc import Sequence

from mypy_extensions import mypyc_attr

from megalith.base.random import splitmix64
from megalith.policy.cluster import InstanceFacts
from megalith.policy.facts import Request
from megalith.policy.router_options import RouterOptions, require
from megalith.policy.routing import OUTSTANDING, RuleRouter


class ExpertAffinityOptions(RouterOptions):
    """When load decides instead of the model."""

    imbalance: int = 16
    """Most outstanding requests that the home of a model may have above the least loaded instance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.imbalance >= 0, "imbalance must be at least 0")


@mypyc_attr(allow_interpreted_subclasses=True)
class ExpertAffinity(RuleRouter):
    """The home of the request's model, unless it is too busy; then the fewest unfinished requests."""

    name = "expert-affinity"

    def __init__(self, options: ExpertAffinityOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._imbalance = options.imbalance

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:
        """Linear in the instances."""
        stream = splitmix64(self.seed, request.model)
        home = max(instances, key=lambda instance: splitmix64(stream, instance.id))
        idlest = min(instances, key=OUTSTANDING)
        return idlest if home.outstanding > idlest.outstanding + self._imbalance else home
