"""What the nodes of a cluster do, on a real one."""

from dataclasses import replace

import pytest

from paris_ray.config import Config, FleetConfig, GpuConfig, load
from paris_ray.errors import ConfigError
from paris_ray.planning import plan

pytestmark = pytest.mark.ray


@pytest.fixture
def config() -> Config:
    known = GpuConfig(name="CPU", dollars_per_hour=0.25, watts=90.0, preemptions_per_day=2.0)
    return replace(load("quickstart"), fleet=FleetConfig(gpus=[known], num_images=100))


def test_a_cluster_becomes_a_fleet_that_can_be_planned_with(
    ray_session: None, config: Config
) -> None:
    from paris_ray.pipeline.probe import probed_fleet

    fleet = probed_fleet(config, seconds=1.0)
    (found,) = fleet.gpus
    assert (found.name, found.dollars_per_hour, found.watts) == ("CPU", 0.25, 90.0)
    assert found.count >= 1
    assert set(found.samples_per_second) == {"seed", "expert", "router"}
    assert fleet.num_images == 100
    schedule = plan(replace(config, fleet=fleet)).schedule
    assert schedule is not None
    assert schedule.days is not None


def test_a_training_that_has_room_nowhere_is_refused(ray_session: None, config: Config) -> None:
    from paris_ray.pipeline.probe import probed_fleet

    large = replace(config, training=replace(config.training, num_cpus=1000.0))
    with pytest.raises(ConfigError, match=r"training\.num_cpus=1000, num_gpus=0 are not allowed"):
        probed_fleet(large, seconds=1.0)
