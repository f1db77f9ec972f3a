"""Arms: many small runs of one corpus, encoded once, each made by the normal stages.

An arm lies in `arms/` of the folder of what compares it, a study or an ablation: so it resumes, is
kept when it is finished and isolates its experts as any other run. A task without a CPU of its own
drives each.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from paris_ray.artifacts import MANIFEST, canonical_json, read_manifest, sha256_hex
from paris_ray.config import Config, identity, run_folder, with_overrides
from paris_ray.errors import TrainingError
from paris_ray.pipeline.evaluate import evaluate
from paris_ray.pipeline.prepare import encode
from paris_ray.pipeline.stages import run
from paris_ray.run import ROUTER, Run
from paris_ray.study.arms import Arm
from paris_ray.study.numbers import arm_numbers
from paris_ray.training.spending import cpu_seconds_spent

logger = logging.getLogger("paris_ray")

VERBS = ("prepare", "train_seed", "train_experts", "train_router", "evaluate")
POLL_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class PlannedArm:
    """An arm with its configurations.

    Attributes:
        arm: The arm.
        config: Of its run.
        drawings: Of the evaluations beside the default, by name.
    """

    arm: Arm
    config: Config
    drawings: dict[str, Config]

    @property
    def finished(self) -> bool:
        """Whether everything of it is there."""
        folders = [Run(config).evaluation for config in self._evaluated]
        return all(folder.exists(MANIFEST) for folder in folders)

    @property
    def digest(self) -> str:
        """The digest of what decides its numbers, wherever it runs."""
        places = {"run_dir": "", "prepared_from": None}
        decisive = [identity(config) | places for config in self._evaluated]
        return sha256_hex(canonical_json(decisive))

    @property
    def _evaluated(self) -> list[Config]:
        return [self.config, *self.drawings.values()]


def plan_arms(config: Config, arms: Sequence[Arm]) -> list[PlannedArm]:
    """Return arms with their configurations, all checked before anything runs.

    Args:
        config: What they vary; `run_dir` is the folder of what compares them.
        arms: The arms.
    """
    folder = run_folder(config)
    planned = []
    for arm in arms:
        place = replace(config, run_dir=f"{folder}/arms/{arm.folder}", prepared_from=folder)
        own = with_overrides(place, arm.overrides)
        drawings = {each.name: with_overrides(own, each.overrides) for each in arm.drawings}
        planned.append(PlannedArm(arm, own, drawings))
    return planned


def arms_run(
    config: Config, arms: Sequence[PlannedArm], known: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Encode the corpus, run what is not finished of arms, and return the numbers of all.

    Args:
        config: What they vary.
        arms: What `plan_arms` returned.
        known: `arms`, numbers of earlier ones: those of the very same configuration are not run.

    Raises:
        TrainingError: naming the arms that failed, after all others are done.
    """
    found = {numbers["digest"]: numbers for numbers in known.get("arms", ())}
    if any(arm.digest not in found for arm in arms):
        encode(config)
        found |= _run_arms([arm for arm in arms if arm.digest not in found])
    # What an arm is called, and where it stands, is the plan's of today.
    return [found[arm.digest] | asdict(arm.arm) for arm in arms]


@ray.remote(num_cpus=0)
def run_arm(planned: PlannedArm) -> dict[str, Any]:
    """Run the stages of an arm, each as tasks of its own; return its numbers."""
    for verb in VERBS:
        run(planned.config, verb)
    evaluations = {planned.arm.routing: planned.config, **planned.drawings}
    drawn = {name: (config, evaluate(config).facts) for name, config in evaluations.items()}
    router = read_manifest(Run(planned.config).router, ROUTER).facts
    numbers = arm_numbers(planned.arm, planned.config, router, drawn)
    return {"digest": planned.digest, "cpu_seconds": _cpu_seconds(planned.config), **numbers}


def _cpu_seconds(config: Config) -> float:
    """Return what the trainings of a run computed, but for the router's."""
    own = Run(config)
    trained = [own.seed] if config.seed_training.steps else []
    return sum(map(cpu_seconds_spent, [*trained, *map(own.expert, range(own.num_experts))]))


def _run_arms(arms: Sequence[PlannedArm]) -> dict[str, dict[str, Any]]:
    """Run arms, as many at a time as trainings have room; return their numbers by their digest.

    Every arm has a first seed before one has a second; of a seed, the longest go first, so that
    none is left to run alone.
    """
    each = max(arm.config.training.num_cpus for arm in arms) or 1.0
    room = max(1, int(ray.cluster_resources().get("CPU", 1) / each))
    progress = _Progress(arms)
    waiting = sorted(enumerate(arms), key=lambda each: (each[1].arm.seed, -each[1].arm.total_steps))
    running: dict[ray.ObjectRef[dict[str, Any]], int] = {}
    numbers: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < room:
            index, arm = waiting.pop(0)
            running[run_arm.options(name=f"arm {arm.arm.folder}").remote(arm)] = index
        finished, _ = ray.wait(list(running), timeout=POLL_INTERVAL_S)
        for result in finished:
            index = running.pop(result)
            try:
                numbers[arms[index].digest] = ray.get(result)
            except ray.exceptions.RayError as error:
                failed.append(f"{arms[index].arm.folder}: {getattr(error, 'cause', error)}")
            progress.say(arms[index])
    if failed:
        raise TrainingError(f"{len(failed)} of {len(arms)} arms failed: {'; '.join(failed)}")
    return numbers


class _Progress:
    """Says how many arms are done and how long the others will take, by their steps."""

    def __init__(self, arms: Sequence[PlannedArm]) -> None:
        self._started, self._count, self._done = time.monotonic(), len(arms), 0
        self._steps = {a.arm.folder: a.arm.total_steps for a in arms if not a.finished}
        self._rest = self._all = sum(self._steps.values())
        logger.info("%d arms, %d to run", len(arms), len(self._steps))

    def say(self, arm: PlannedArm) -> None:
        self._done += 1
        self._rest -= self._steps.get(arm.arm.folder, 0)
        done = self._all - self._rest
        eta = (time.monotonic() - self._started) * self._rest / done if done else 0.0
        line = "%d/%d arms done (%s), ETA %.0f min"
        logger.info(line, self._done, self._count, arm.arm.folder, eta / 60)
