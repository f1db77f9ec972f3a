"""The application builder that `serve/config.yaml` names.

    serve deploy serve/config.yaml        # onto a running cluster
    serve run serve/config.yaml           # or in the foreground, on a local one

Ray must have been started with RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.gate:edge.

Ingress -> Sampler -> Expert-0 ... Expert-K-1: each a deployment, with its own replicas and
resources.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from paris_ray import trials
from paris_ray.config import Dtype
from paris_ray.errors import ConfigError
from paris_ray.folders import absolute_uri
from paris_ray.loopback import is_loopback
from paris_ray.sampling.engine import Limits
from paris_ray.storage import is_uri
from serve import gate
from serve.expert import ExpertServer
from serve.ingress import HttpOptions, Ingress
from serve.opening import open_bundle
from serve.routes import create_api
from serve.sampler import Sampler
from serve.scaling import EXPERT_PREFIX, SAMPLER
from serve.signing import SigningOptions
from serve.source import BundleSource, LoRASource

MAX_ONGOING_REQUESTS = 1_000  # of a replica
# A dead replica is replaced when Serve asks it next: by itself it would ask every ten seconds.
HEALTH_CHECK_PERIOD_S = 1.0
LIMITS = Limits()
# Of a replica that is to end, beyond what a request may take: its answer is still to be made and
# sent, and Serve looks every two seconds whether that is so.
ENDING_S = 10.0
REPLICA_ENVIRONMENT = {
    trials.SHARED: "1",
    # What Ray's `RAY_SERVE_THROUGHPUT_OPTIMIZED` sets for a replica, less direct ingress, which
    # would open a second door beside the proxy: fewer threads and less logging in each call.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
REPOSITORY = Path(__file__).resolve().parents[1]


class DeploymentOptions(BaseModel):
    """Size of one deployment; everything else that Serve knows goes under `deployments:`.

    Attributes:
        num_replicas: How many processes.
        num_cpus: CPUs that Ray reserves for each; torch uses `threads`, whatever this says.
        num_gpus: GPUs that Ray reserves for each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.05, ge=0)
    num_gpus: float = Field(default=0, ge=0)


class IngressOptions(DeploymentOptions):
    """Size of the HTTP side: two processes, so that the death of one is not an outage."""

    num_replicas: int = Field(default=2, ge=1)


class ScaledOptions(DeploymentOptions):
    """Size of a deployment whose number of replicas may follow the load.

    Attributes:
        max_replicas: The most, where `num_replicas` are the least; null keeps the number.
    """

    max_replicas: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_range(self) -> "ScaledOptions":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is not allowed: "
                f"at least num_replicas={self.num_replicas}"
            )
        return self

    @property
    def most(self) -> int:
        """How many replicas there may be."""
        return self.max_replicas or self.num_replicas


class ScalingOptions(BaseModel):
    """How the number of replicas follows the load, see `serve.scaling`.

    Attributes:
        period_s: How often Samplers report; a number is decided by the reports of two periods.
        pictures_per_sampler: How many pictures, drawn or waiting, a Sampler should have.
        calls_per_expert: How many unanswered calls a replica of an expert should have.
        downscale_delay_s: How long fewer replicas must be enough before one is ended.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    period_s: float = Field(default=10, gt=0)
    pictures_per_sampler: float = Field(default=LIMITS.max_active_pictures / 2, gt=0)
    calls_per_expert: float = Field(default=LIMITS.max_batch_rows, gt=0)
    downscale_delay_s: float = Field(default=300, ge=0)


class LoRAOptions(BaseModel):
    """One adapter.

    Attributes:
        path: A folder that `jobs.train_lora` made, or any in PEFT's layout; relative like `bundle`.
        expert: Number of its expert; null takes the one that the folder's receipt or manifest
            names.
        merge: Compute the expert's weights with the adapter once: no slower than without it, but
            the targeted weights are in memory twice.
        receipt_key: For an adapter that was bought through ZKLoRA: the public key that signs your
            receipts, in hexadecimal. `jobs.verify_lora` prints it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    expert: int | None = Field(default=None, ge=0)
    merge: bool = False
    receipt_key: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class LimitOptions(BaseModel):
    """What each Sampler takes on; see `paris_ray.sampling.engine.Limits`.

    Attributes:
        max_batch_rows: Samples of one forward pass; a guided picture is two.
        max_active_pictures: Pictures that are drawn at the same time.
        max_waiting_pictures: Pictures that wait to be drawn; more are refused with 429.
        lost_after_s: How long an expert may fail before pictures are drawn without it; a call of
            it may take half of that.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_rows: int = Field(default=LIMITS.max_batch_rows, ge=2)
    max_active_pictures: int = Field(default=LIMITS.max_active_pictures, ge=1)
    max_waiting_pictures: int = Field(default=LIMITS.max_waiting_pictures, ge=0)
    lost_after_s: float = Field(default=LIMITS.lost_after_s, gt=0)

    def limits(self) -> Limits:
        """Return the same for the engine."""
        return Limits(**self.model_dump())


class AppArgs(BaseModel):
    """The `args:` of `serve/config.yaml`.

    Attributes:
        bundle: A path or a pyarrow.fs URI. A relative path starts at the repository root, since
            nobody knows the working directory of a replica.
        bundle_digest: Digest of the only bundle that may be served; null serves what is there.
            Change it when a new bundle has the old path, so that Serve loads it.
        colocated: Keep the experts inside the Sampler process: same pictures, no hop between
            processes, one set of resources (`sampler`). For a laptop or a single GPU.
        dtype: Data type of experts and router: `float32`, `bfloat16` or `float16`; null keeps the
            stored one.
        device: Where each replica computes: `cpu`, `cuda` (fails where it sees no GPU) or `auto`:
            a GPU if its `num_gpus` reserves one, else the CPU.
        offload: Keep at most two experts on the device, the ones used last; for a single GPU that
            has no room for all. Only with `colocated`.
        exact: Whether a seed means the same bytes whatever else is drawn; a machine that cannot
            batch so computes one sample after the other, and says so in its log. False batches
            there too, and the last bits of a picture depend on its company.
        threads: Torch threads of each Sampler and expert replica.
        loras: Adapters by the name that requests give. Serve loads one anew when it is deployed
            with another name, path or weights.
        limits: What each Sampler takes on.
        aliases: Other names that requests may give the model: `{gpt-image-1: quickstart}`. Many
            tools cannot change the name.
        max_size: The largest width and height, in pixels, that pictures are resized to where a
            request asks for another size than the model's; null refuses such requests.
        public_url: What links to pictures begin with, for a server behind a proxy, which needs
            keys; null: as the request was addressed.
        timeout_s: Seconds after which a request is given up; less than
            `http_options.request_timeout_s`.
        api_key_file: A file with the key or, if it is called *.yaml, with the keys that clients
            must send (`serve.keys`); relative like `bundle`. Null serves requests from this machine
            alone, and only where Serve listens on loopback.
        cors_origins: Origins whose web pages may use the API from a browser, such as
            `https://example.com`; `*` means all.
        signing: By whom picture files are signed; paths are relative like `bundle`. Null signs
            none.
        ingress: Size of the HTTP side.
        sampler: Size of the Sampler.
        expert: Size of every expert.
        experts: What differs for single experts, by number; that of the last resort follows theirs.
        last_resort: Deploy the seed that the bundle's experts started from, if it has one, like one
            more expert: it draws in the place of those that are lost. Not with `colocated`, where
            none is lost alone.
        scaling: How numbers follow the load, where `max_replicas` lets them; the application's
            `autoscaling_policy` must be `serve.scaling:policy`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = "runs/quickstart/bundle"
    bundle_digest: str | None = None
    colocated: bool = False
    dtype: Dtype | None = None
    device: str = "auto"
    offload: bool = False
    exact: bool = True
    threads: int = Field(default=1, ge=1)
    loras: dict[str, LoRAOptions] = {}
    limits: LimitOptions = LimitOptions()
    aliases: dict[str, str] = {}
    max_size: int | None = Field(default=2048, ge=1, le=8192)
    public_url: str | None = Field(default=None, pattern="^https?://")
    timeout_s: float = Field(default=110, gt=0)
    api_key_file: str | None = None
    cors_origins: list[str] = []
    signing: SigningOptions | None = None
    ingress: IngressOptions = IngressOptions()
    sampler: ScaledOptions = ScaledOptions()
    expert: ScaledOptions = ScaledOptions()
    experts: dict[int, ScaledOptions] = {}
    last_resort: bool = True
    scaling: ScalingOptions = ScalingOptions()

    @model_validator(mode="after")
    def _check(self) -> "AppArgs":
        if self.offload and not self.colocated:
            raise ValueError("offload=true is not allowed without colocated=true")
        for index in self.experts:
            self.expert_options(index)
        return self

    @model_validator(mode="after")
    def _check_public_url(self) -> "AppArgs":
        host = urlsplit(self.public_url or "").hostname or "localhost"
        if self.api_key_file is None and not is_loopback(host):
            raise ValueError(
                f"public_url={self.public_url!r} is not allowed without api_key_file: whoever "
                "comes through a proxy of this machine looks like a local client"
            )
        return self

    @property
    def grace_s(self) -> float:
        """For how long a replica that is replaced may finish what it has; then Serve kills it."""
        return gate.BODY_TIMEOUT_S + self.timeout_s + ENDING_S

    def expert_options(self, index: int) -> ScaledOptions:
        """Return the size of one expert."""
        own = self.experts.get(index, ScaledOptions()).model_dump(exclude_unset=True)
        return ScaledOptions.model_validate(self.expert.model_dump() | own)


def build(args: AppArgs) -> Application:
    """Return the application for a bundle.

    Args:
        args: What `args:` in the Serve config holds; Serve checks and converts it.

    Raises:
        BundleError: if there is no bundle, or an adapter does not fit it.
        ReceiptError: if an adapter was bought, and its receipt does not allow it.
        ConfigError: if `experts` names one that the bundle does not have, or `aliases` another
            model.
    """
    source = _source(args).pinned()
    bundle = open_bundle(source)
    num_models = bundle.num_models if args.last_resort else bundle.num_experts
    # From here on each adapter tells its expert, so that an expert reads only its own.
    loras = [lora.pinned(bundle.loras[lora.name]) for lora in source.loras]
    source = source._replace(loras=tuple(loras))
    for index in args.experts:
        if not 0 <= index < num_models:
            raise ConfigError(f"experts: {index} is not allowed: the bundle has {num_models}")
    options = _http_options(args, bundle.facts.model_name)
    sizes = [] if args.colocated else [args.expert_options(k) for k in range(num_models)]
    sampler = _deploy_sampler(args, sizes).bind(
        _on_reserved_device(source, args.sampler),
        None if args.colocated else _bind_experts(args, source, sizes),
        threads=args.threads,
        limits=args.limits.limits(),
        # While every replica computes, the next batch is on its way.
        lanes=[size.most + 1 for size in sizes],
    )
    key_file = None if args.api_key_file is None else _from_repository(args.api_key_file)
    ingress_class = serve.ingress(create_api(args.cors_origins))(Ingress)
    ingress = _deploy(ingress_class, "Ingress", args.ingress).options(
        max_ongoing_requests=gate.MAX_ONGOING_REQUESTS,
        max_queued_requests=gate.MAX_QUEUED_REQUESTS,
        graceful_shutdown_timeout_s=args.grace_s,
    )
    application: Application = ingress.bind(source, sampler, key_file, options)
    return application


def _source(args: AppArgs) -> BundleSource:
    loras = [
        LoRASource(name, _from_repository(lora.path), lora.expert, lora.merge, lora.receipt_key)
        for name, lora in args.loras.items()
    ]
    return BundleSource(
        _from_repository(args.bundle),
        args.bundle_digest,
        args.dtype,
        args.device,
        args.offload,
        tuple(loras),
        args.exact,
    )


def _http_options(args: AppArgs, model_name: str) -> HttpOptions:
    for alias, name in args.aliases.items():
        if name != model_name or alias == model_name:
            raise ConfigError(
                f"aliases: {alias}={name!r} is not allowed: the model is {model_name!r}"
            )
    return HttpOptions(
        aliases=tuple(args.aliases),
        max_size=args.max_size,
        public_url=args.public_url,
        timeout_s=args.timeout_s,
        max_pictures=args.limits.limits().max_pictures,
        signing=None if args.signing is None else _signing(args.signing),
    )


def _signing(options: SigningOptions) -> SigningOptions:
    files = options.model_dump()
    return SigningOptions(**{name: _from_repository(path) for name, path in files.items()})


def _deploy_sampler(args: AppArgs, experts: Sequence[ScaledOptions]) -> Any:
    deployment = _deploy(Sampler, SAMPLER, args.sampler).options(
        graceful_shutdown_timeout_s=args.grace_s
    )
    # It reports for all deployments, and Serve asks only those that it scales.
    if any(size.max_replicas is not None for size in (args.sampler, *experts)):
        deployment = _scale(
            deployment, args.sampler, args.scaling, args.scaling.pictures_per_sampler
        )
    return deployment


def _bind_experts(
    args: AppArgs, source: BundleSource, sizes: Sequence[ScaledOptions]
) -> list[Application]:
    return [
        _deploy_expert(args, k, size).bind(
            _on_reserved_device(source.of_expert(k), size),
            k,
            threads=args.threads,
            max_rows=args.limits.max_batch_rows,
        )
        for k, size in enumerate(sizes)
    ]


def _deploy_expert(args: AppArgs, index: int, size: ScaledOptions) -> Any:
    deployment = _deploy(ExpertServer, f"{EXPERT_PREFIX}{index}", size)
    if size.max_replicas is None:
        return deployment
    return _scale(deployment, size, args.scaling, args.scaling.calls_per_expert)


def _scale(deployment: Any, size: ScaledOptions, scaling: ScalingOptions, target: float) -> Any:
    """Let Serve change the number of replicas, by what two periods tell."""
    return deployment.options(
        num_replicas="auto",
        autoscaling_config=AutoscalingConfig(
            min_replicas=size.num_replicas,
            max_replicas=size.most,
            target_ongoing_requests=target,
            metrics_interval_s=scaling.period_s,
            look_back_period_s=2 * scaling.period_s,
            upscale_delay_s=0,
            downscale_delay_s=scaling.downscale_delay_s,
        ),
    )


def _on_reserved_device(source: BundleSource, options: DeploymentOptions) -> BundleSource:
    """Let `auto` mean a GPU only for replicas that reserve one: Ray shows all to the others too."""
    if source.device == "auto" and options.num_gpus == 0:
        return source._replace(device="cpu")
    return source


def _deploy(deployment_class: type[Any], name: str, options: DeploymentOptions) -> Any:
    return serve.deployment(
        name=name,
        num_replicas=options.num_replicas,
        # Who is admitted is decided by the application: Serve's own limit would keep the rest
        # waiting, health checks and refusals among them.
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={
            "num_cpus": options.num_cpus,
            "num_gpus": options.num_gpus,
            "runtime_env": {"env_vars": REPLICA_ENVIRONMENT},
        },
        # The gate logs each request; Serve would add a line for every call of an expert.
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )(deployment_class)


def _from_repository(location: str) -> str:
    return location if is_uri(location) else absolute_uri(str(REPOSITORY / location))
