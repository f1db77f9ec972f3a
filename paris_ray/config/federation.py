"""A run of a site of a federation."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationConfig:
    """What a site was given; `jobs.federate join` writes it."""

    # What join made of the federation's folder: its encoders and centroids are copied, not fitted
    folder: str | None = None
    # Clusters whose experts are trained here; of the others there may be no rows
    experts: list[int] = field(default_factory=list)
