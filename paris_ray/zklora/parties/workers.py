"""Where the weights are: processes that evaluate, draw and prove; the gateway asks them.

`LoRAWorker` answers updates of rows, `AuditWorker` draws whole pictures, `prove_modules` proves.
None of them knows users.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.util.metrics import Histogram

from paris_ray.bundle import Bundle, load_bundle
from paris_ray.diffusion import num_evaluations
from paris_ray.errors import ConfigError, ParisError, ProtocolError
from paris_ray.sampling import generate
from paris_ray.sampling.sampler import SamplingError, SamplingOptions, sampling_options
from paris_ray.zklora.commitment import ModuleOpening
from paris_ray.zklora.fixed_point import Int16, Int64, evaluate
from paris_ray.zklora.inference import adapt
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.offer import base_of_expert
from paris_ray.zklora.parties.messages import DrawRequest
from paris_ray.zklora.proof import prove
from paris_ray.zklora.transcript import LogSummary, RowLog, challenge_rows

PROVE_RETRIES = 5
AUDITED = "audited"  # the view's name within the worker
CHECKS = "checks"  # its thread for requests
MAX_LOG_ROWS = 2**22  # of one drawing: about 1 GB of leaves and nodes


class OpenedRows(NamedTuple):
    """The audited rows of a module, and where they are in the log.

    Attributes:
        x: `(m, d_in)` int16.
        y: `(m, d_out)` int64.
        places: `(m, 3)` int64: number of the call, exponent, and length of the path, of each row.
        paths: `(sum of the lengths, 32)` uint8.
    """

    x: Int16
    y: Int64
    places: NDArray[np.int64]
    paths: NDArray[np.uint8]


# They reserve no CPU: one that waits must not keep a proof from the last one.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class LoRAWorker:
    """Answers the updates of rows; the weights never leave it.

    Args:
        openings: The weights.
    """

    def __init__(self, openings: Mapping[str, ModuleOpening]) -> None:
        self._openings = openings

    def evaluate(self, module: str, x: Int16) -> Int64:
        """Return the exact update `(rows, d_out)` of some rows `(rows, d_in)`."""
        return evaluate(self._openings[module].module, x)


# Ray's stubs do not know of groups: requests are checked beside what is being drawn.
@ray.remote(  # type: ignore[call-overload]
    num_cpus=0, max_restarts=-1, max_task_retries=3, concurrency_groups={CHECKS: 1}
)
class AuditWorker:
    """Draws pictures with base and adapter, and logs every row that the adapter computed.

    No row is kept: those that the user's nonce picks are computed again, by drawing the same
    pictures again. That the second log is the first is checked. What kills it while it draws is
    not done again by itself.

    Args:
        openings: The weights.
        manifest: Of the offer.
        bundle: Where the base is.
        threads: Torch threads.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self,
        openings: Mapping[str, ModuleOpening],
        manifest: AdapterManifest,
        bundle: str,
        threads: int,
        device: str,
    ) -> None:
        self._modules = {name: opening.module for name, opening in openings.items()}
        self._recorder = _Recorder(self._modules)
        self._manifest, self._location = manifest, bundle
        self._threads, self._device = threads, device
        self._loaded: Bundle | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Load all that drawing takes; a worker that is replaced does so when it is asked.

        Raises:
            ParisError: if the bundle is damaged, or not what the adapter is for.
        """
        _ = self._bundle

    @property
    def _bundle(self) -> Bundle:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> Bundle:
        torch.set_num_threads(self._threads)
        bundle, manifest = load_bundle(self._location, device=self._device), self._manifest
        expert = manifest.base.expert
        if expert is None or base_of_expert(bundle, expert) != manifest.base:
            raise ConfigError(f"bundle={self._location!r} is not allowed: another base's adapter")
        bundle.add_view(
            AUDITED,
            expert,
            lambda model: adapt(model, manifest.terms, manifest.scale, self._evaluate),
        )
        bundle.expert(expert, AUDITED)
        _ = bundle.null_text, bundle.router, bundle.codec
        return bundle

    def _evaluate(self, name: str, x: Int16, exponent: int) -> Int64:
        return self._recorder.evaluate(name, x, exponent)

    @ray.method(concurrency_group=CHECKS)
    def check(self, request: DrawRequest) -> None:
        """Raise ProtocolError if a request cannot be drawn, or its log would be too long."""
        bundle = self._bundle
        try:
            options = sampling_options(bundle, lora=AUDITED, **_options(request))
        except ParisError as error:
            raise ProtocolError(str(error)) from None
        config = bundle.expert_configs[bundle.loras[AUDITED]]
        tokens = (config.input_size // config.patch_size) ** 2
        _check_size(len(request.prompts), options, tokens * len(self._modules))

    @ray.method(max_task_retries=0)
    def draw(self, request: DrawRequest) -> tuple[NDArray[np.uint8], LogSummary]:
        """Return the pictures `(n, S, S, 3)` of a request, and the summary of their log.

        Raises:
            ProtocolError: if nothing can be drawn so, or a module has fewer rows than are audited.
        """
        pictures, recorder = self._draw(request, {})
        _check_counts(recorder.log.counts, self._modules, request.audit_rows)
        return pictures, LogSummary.of(recorder.log, request.digest(pictures))

    @ray.method(max_task_retries=0)
    def open_rows(
        self, request: DrawRequest, log: LogSummary, nonce_v: str
    ) -> dict[str, OpenedRows]:
        """Return the rows that a nonce picks from the log of a request.

        Raises:
            ProtocolError: if drawing again gave another log.
        """
        wanted = {
            name: challenge_rows(nonce_v, log.root, name, count, request.audit_rows)
            for name, count in log.counts.items()
        }
        _, recorder = self._draw(request, wanted)
        if LogSummary.of(recorder.log, log.drawing) != log:
            raise ProtocolError("drawing again gave another log: this session cannot be proved")
        return {name: recorder.opened(name) for name in wanted}

    def _draw(
        self, request: DrawRequest, wanted: Mapping[str, list[int]]
    ) -> tuple[NDArray[np.uint8], "_Recorder"]:
        self._recorder = _Recorder(self._modules, wanted)
        prompts, seed, options = request.prompts, request.seed, _options(request)
        try:
            images = generate(self._bundle, prompts, seed=seed, lora=AUDITED, **options)
        except (ParisError, SamplingError) as error:
            raise ProtocolError(str(error)) from None
        return np.stack([np.asarray(image) for image in images]), self._recorder


def _options(request: DrawRequest) -> dict[str, Any]:
    return request.model_dump(include={"num_inference_steps", "guidance_scale", "routing"})


def _check_size(pictures: int, options: SamplingOptions, rows: int) -> None:
    """Raise ProtocolError if a log could be too long, with so many rows of a picture at a time."""
    steps = options.num_inference_steps
    times = 2 * num_evaluations(options.solver, steps)  # twice: guidance
    if (total := pictures * times * rows) > MAX_LOG_ROWS:
        raise ProtocolError(
            f"{pictures} prompts with num_inference_steps={steps} are not allowed: the log could "
            f"have {total} rows, at most {MAX_LOG_ROWS}: ask for fewer prompts or steps"
        )


def _check_counts(counts: Mapping[str, int], modules: Mapping[str, Any], audit_rows: int) -> None:
    """Raise ProtocolError unless the log of a drawing has so many rows of each module."""
    fewest = min(modules, key=lambda name: counts.get(name, 0))
    found = counts.get(fewest, 0)
    if not found:
        raise ProtocolError(
            f"the adapted expert had no part in these pictures, the log has no row of {fewest}: "
            "choose another prompt, seed or routing"
        )
    if found < audit_rows:
        raise ProtocolError(
            f"audit_rows={audit_rows} is not allowed: {fewest} has {found} rows in these pictures: "
            "choose fewer audit rows, or more steps"
        )


class _Recorder:
    """Evaluates modules, logs each row, and keeps those that are wanted."""

    def __init__(
        self, modules: Mapping[str, Any], wanted: Mapping[str, list[int]] | None = None
    ) -> None:
        self.log = RowLog()
        self._modules = modules
        self._wanted = {name: set(rows) for name, rows in (wanted or {}).items()}
        self._kept: dict[str, list[tuple[int, int, int, Int16, Int64]]] = {}

    def evaluate(self, name: str, x: Int16, exponent: int) -> Int64:
        y = evaluate(self._modules[name], x)
        call, start = self.log.append(name, exponent, x, y)
        for row in self._wanted.get(name, set()) & set(range(start, start + len(x))):
            kept = (row, call, exponent, x[row - start].copy(), y[row - start].copy())
            self._kept.setdefault(name, []).append(kept)
        return y

    def opened(self, name: str) -> OpenedRows:
        kept = sorted(self._kept[name], key=lambda row: row[0])
        paths = [self.log.prove_inclusion(name, row) for row, *_ in kept]
        places = [
            (call, exponent, len(path))
            for (_, call, exponent, _, _), path in zip(kept, paths, strict=True)
        ]
        nodes = b"".join(node for path in paths for node in path)
        return OpenedRows(
            np.stack([x for *_, x, _ in kept]),
            np.stack([y for *_, y in kept]),
            np.array(places, np.int64),
            np.frombuffer(nodes, np.uint8).reshape(-1, 32),
        )


@ray.remote(num_cpus=1, max_retries=PROVE_RETRIES)
def prove_modules(
    openings: Mapping[str, ModuleOpening], claims: Mapping[str, tuple[Int16, Int64, bytes]]
) -> dict[str, bytes]:
    """Return the proof of each module; a task that is tried again draws new masks.

    Args:
        openings: The weights.
        claims: Inputs, outputs and context by module.
    """
    seconds = Histogram(
        "paris_zklora_prove_seconds",
        "Time to prove a module.",
        boundaries=[0.03, 0.1, 0.3, 1, 3, 10, 30],
    )
    proofs = {}
    for name, (x, y, context) in claims.items():
        start = time.perf_counter()
        proofs[name] = prove(openings[name], x, y, context)
        seconds.observe(time.perf_counter() - start)
    return proofs
