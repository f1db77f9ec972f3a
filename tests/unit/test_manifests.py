"""cluster.yaml and docs/deploy, checked with what Ray, Kubernetes and this package check.

No package index has KubeRay's CRDs. `kuberay_schema.json` is not a copy of them but a strict schema
of the fields used here, written from KubeRay's API reference (ray.io/v1, KubeRay 1.5 to 1.7). The
pods inside are checked with the JSON schemas of Kubernetes itself.
"""

import copy
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pydantic
import pytest
import yaml

from jobs.command import parser
from jobs.local_cluster import SERVE_EDGE
from paris_ray.config import Config, expert_setup, load
from paris_ray.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
KUBERNETES = "1.33"
EXPERTS = ("Expert-0", "Expert-1", "Expert-2")  # of the tiny bundle
GPU_LABEL = "ray.io/accelerator-type"

AWS = "cluster.yaml"
LOCAL = "docs/deploy/cluster-local.yaml"
RAY_JOB = "docs/deploy/rayjob.yaml"
RAY_SERVICE = "docs/deploy/rayservice.yaml"
STORAGE = "docs/deploy/storage.yaml"
README = "docs/deploy/README.md"
ONE_GPU_SERVE, GPUS_SERVE, CPU_SERVE = (
    f"docs/deploy/serve-{kind}.yaml" for kind in ("one-gpu", "gpus", "cpu")
)
SERVE_CONFIGS = ("serve/config.yaml", ONE_GPU_SERVE, GPUS_SERVE, CPU_SERVE)
DOCKERFILE = "docs/deploy/Dockerfile"
MANIFESTS = (AWS, LOCAL, RAY_JOB, RAY_SERVICE, STORAGE)
# Where each KubeRay kind keeps its cluster.
CLUSTER_FIELDS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
REFUSALS = (
    jsonschema.ValidationError,
    pydantic.ValidationError,
    click.ClickException,
    ConfigError,
)

Document = dict[str, Any]


def read(name: str) -> Document:
    return yaml.safe_load((REPOSITORY / name).read_text())


def check(document: Document) -> None:
    """Check a manifest of any kind, except for the commands in it."""
    kind = document.get("kind")
    if kind is None:
        check_cluster(document)
    elif kind in CLUSTER_FIELDS:
        check_kuberay(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def check_cluster(document: Document) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(document))


def check_kuberay(document: Document) -> None:
    jsonschema.validate(document, SCHEMA | {"$ref": f"#/$defs/{document['kind']}"})
    for pod in pods(document):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    autoscaling_config(document)
    if document["kind"] == "RayService":
        serve_application(document)


def ray_cluster(document: Document) -> Document:
    """Return the part of a KubeRay manifest that describes the Ray cluster."""
    return document["spec"][CLUSTER_FIELDS[document["kind"]]]


def pods(document: Document) -> list[Document]:
    """Return the pods that a KubeRay manifest has templates of."""
    cluster = ray_cluster(document)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    head = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
    return [head | group["template"] for group in groups]


def autoscaling_config(document: Document) -> Any:
    """Return what Ray's autoscaler makes of a manifest: node types, resources, labels."""
    from ray.autoscaler._private.kuberay import autoscaling_config as kuberay
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    if "kind" in document:
        metadata = document["metadata"] | {"namespace": "default"}
        resource = {"metadata": metadata, "spec": ray_cluster(document)}
        document = kuberay._derive_autoscaling_config_from_ray_cr(resource)
    return AutoscalingConfig(document, skip_content_hash=True)


def serve_application(document: Document) -> Any:
    """Return the application of a Serve config, or of a RayService, with typed `args`."""
    from ray.serve.schema import ServeDeploySchema

    from serve.app import AppArgs

    if "spec" in document:
        document = yaml.safe_load(document["spec"]["serveConfigV2"])
    config = ServeDeploySchema.model_validate(document, extra="forbid")  # Serve itself ignores them
    (application,) = config.applications
    application.args = AppArgs.model_validate(application.args)
    return application


@pytest.mark.parametrize("name", MANIFESTS)
def test_is_accepted(name: str) -> None:
    check(read(name))


WORKER = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
SERVING_WORKER = ("spec", "rayClusterConfig", "workerGroupSpecs", 1)
CONTAINER = ("template", "spec", "containers", 0)
Keys = tuple[str | int, ...]


def broken(document: Document, keys: Keys) -> tuple[Any, Any]:
    """Return the container of a nested key, and the key."""
    *path, last = keys
    place: Any = document
    for key in path:
        place = place[key]
    assert last in place, f"the test names {keys}, which the manifest does not have"
    return place, last


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (AWS, ("upscaling_speed",)),
        (AWS, ("available_node_types", "worker_l40s", "labels")),
        (AWS, ("available_node_types", "worker_a10g", "max_workers")),
        (AWS, ("auth", "ssh_user")),
        (LOCAL, ("initialization_commands",)),
        (LOCAL, ("auth", "ssh_private_key")),
        (LOCAL, ("provider", "worker_ips")),
        (RAY_JOB, ("spec", "entrypoint")),
        (RAY_JOB, ("spec", "backoffLimit")),
        (RAY_JOB, ("spec", "rayClusterSpec", "authOptions")),
        (RAY_JOB, ("spec", "rayClusterSpec", "autoscalerOptions", "idleTimeoutSeconds")),
        (RAY_JOB, (*WORKER, "labels")),
        (RAY_JOB, (*WORKER, "maxReplicas")),
        (RAY_JOB, (*WORKER, "template", "spec", "tolerations")),
        (RAY_JOB, (*WORKER, "template", "spec", "tolerations", 0, "operator")),
        (RAY_JOB, (*WORKER, "template", "spec", "securityContext", "runAsNonRoot")),
        (RAY_JOB, (*WORKER, *CONTAINER, "resources", "limits")),
        (RAY_SERVICE, ("spec", "serveConfigV2")),
        (RAY_SERVICE, ("spec", "excludeHeadPodFromServeSvc")),
        (RAY_SERVICE, (*SERVING_WORKER, *CONTAINER, "volumeMounts", 0, "readOnly")),
        (RAY_SERVICE, (*SERVING_WORKER, "template", "spec", "volumes", 1, "secret")),
        (STORAGE, ("spec", "accessModes")),
    ],
)
def test_a_misspelt_field_is_refused(name: str, keys: Keys) -> None:
    document = copy.deepcopy(read(name))
    place, key = broken(document, keys)
    place[f"{key}s"] = place.pop(key)
    with pytest.raises(REFUSALS, match=key):
        check(document)


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        (AWS, ("max_workers",), "8"),
        (AWS, ("available_node_types", "worker_a10g", "resources", "GPU"), "one"),
        (AWS, ("available_node_types", "worker_a10g", "labels", GPU_LABEL), 24),
        (LOCAL, ("provider", "head_ip"), 192),
        (LOCAL, ("worker_start_ray_commands",), "ray start"),
        (RAY_JOB, ("metadata", "name"), "Paris_XL2"),
        (RAY_JOB, ("spec", "backoffLimit"), "3"),
        (RAY_JOB, ("spec", "submissionMode"), "HTTP"),
        (RAY_JOB, ("spec", "shutdownAfterJobFinishes"), "yes"),
        (RAY_JOB, ("spec", "rayClusterSpec", "rayVersion"), 2.6),
        (RAY_JOB, ("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (RAY_JOB, (*WORKER, "maxReplicas"), "8"),
        (RAY_JOB, (*WORKER, "template", "spec", "securityContext", "runAsUser"), "ray"),
        (RAY_SERVICE, (*SERVING_WORKER, *CONTAINER, "ports", 0, "containerPort"), "8000"),
        (RAY_SERVICE, (*SERVING_WORKER, "labels", GPU_LABEL), 24),
        (STORAGE, ("spec", "accessModes"), "ReadWriteMany"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(name: str, keys: Keys, value: object) -> None:
    document = copy.deepcopy(read(name))
    place, key = broken(document, keys)
    place[key] = value
    with pytest.raises(REFUSALS, match=re.escape(str(value))):
        check(document)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("num_gpus: 0.25", "num_gpu: 0.25"),
        ("num_gpus: 0.25", "num_gpus: a quarter"),
        ("route_prefix: /", "route_prefixes: /"),
        ("threads: 1", "threads: 0"),
        ("L40S}", "-L40S}"),
    ],
)
def test_a_broken_serve_config_is_refused(right: str, wrong: str) -> None:
    document = read(RAY_SERVICE)
    assert right in document["spec"]["serveConfigV2"]
    document["spec"]["serveConfigV2"] = document["spec"]["serveConfigV2"].replace(right, wrong)
    with pytest.raises((*REFUSALS, ValueError)):
        serve_application(document)


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_every_ray_start_asks_for_the_token_that_is_mounted(name: str) -> None:
    document = read(name)
    commands = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in document[key]
        if "ray start" in command
    ]
    assert len(commands) == 2
    for command in commands:
        assert "RAY_AUTH_MODE=token" in command
        (path,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", command)
        assert path in document["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in commands[0]


@pytest.mark.parametrize("name", [RAY_JOB, RAY_SERVICE])
def test_kuberay_clusters_ask_for_a_token_and_run_without_rights(name: str) -> None:
    document = read(name)
    assert ray_cluster(document)["authOptions"] == {"mode": "token"}
    for pod in pods(document):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_every_ray_has_the_edge_around_its_http_proxy() -> None:
    (variable,) = [f"{name}={value}" for name, value in SERVE_EDGE.items()]
    for name in (AWS, LOCAL):
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            assert f" {variable} ray start" in read(name)[key][-1]
    assert f"\nENV {variable}\n" in (REPOSITORY / DOCKERFILE).read_text()
    module, function = SERVE_EDGE["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_workers_on_aws_are_spot_gpus_of_two_families() -> None:
    types = read(AWS)["available_node_types"]
    workers = [node for name, node in types.items() if name != "head"]
    families = {worker["node_config"]["InstanceType"].split(".")[0] for worker in workers}
    assert len(families) == 2
    for worker in workers:
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["resources"]["GPU"] == 1


def test_a_local_cluster_keeps_every_machine() -> None:
    from ray.autoscaler._private.util import prepare_config

    document = read(LOCAL)
    (node_type,) = prepare_config(document)["available_node_types"].values()
    assert node_type["min_workers"] == len(document["provider"]["worker_ips"])


def test_versions_of_ray_and_images_agree() -> None:
    dockerfile = (REPOSITORY / DOCKERFILE).read_text()
    (base,) = re.findall(r"^FROM rayproject/ray:(\d+\.\d+\.\d+)-", dockerfile, re.MULTILINE)
    assert f" ray=={base}" in dockerfile
    (built,) = re.findall(r"docker build .* -t (\S+)", dockerfile)
    for name in (RAY_JOB, RAY_SERVICE):
        assert ray_cluster(read(name))["rayVersion"] == base
        containers = [c for pod in pods(read(name)) for c in pod["spec"]["containers"]]
        assert {container["image"] for container in containers} == {built}


def test_what_the_image_copies_exists() -> None:
    for line in re.findall(
        r"^COPY --chown=\S+ (.*) \S+$", (REPOSITORY / DOCKERFILE).read_text(), re.M
    ):
        for source in line.split():
            assert (REPOSITORY / source).exists(), source


@pytest.mark.parametrize("name", [RAY_JOB, RAY_SERVICE])
def test_pods_use_the_claim_and_secret_that_are_made(name: str) -> None:
    claim = read(STORAGE)["metadata"]["name"]
    made = re.findall(r"create secret generic (\S+)", (REPOSITORY / README).read_text())
    for pod in pods(read(name)):
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim
        assert all(v["secret"]["secretName"] in made for v in volumes.values() if "secret" in v)
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()


def mount_of(document: Document, path: str) -> Mapping[str, Any]:
    """Return the mount of the workers in which a path lies."""
    (container,) = pods(document)[1]["spec"]["containers"]
    (mount,) = [m for m in container["volumeMounts"] if Path(path).is_relative_to(m["mountPath"])]
    return mount


def test_the_service_means_the_same_as_the_packaged_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    document = read(RAY_SERVICE)
    application = serve_application(document)
    (packaged,) = ServeDeploySchema.model_validate(read("serve/config.yaml")).applications
    for field in ("name", "route_prefix", "import_path"):
        assert getattr(application, field) == getattr(packaged, field)
    args = application.args
    assert args.expert.num_gpus > 0 and args.sampler.num_gpus > 0
    assert mount_of(document, args.bundle)["name"] == "data"
    key_mount = mount_of(document, args.api_key_file)
    assert key_mount["name"] == "api-key" and key_mount["readOnly"] is True


@pytest.mark.parametrize("name", [*SERVE_CONFIGS, RAY_SERVICE])
def test_every_serve_config_is_one_that_the_application_is_built_of(
    name: str, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    from ray.serve._private.build_app import build_app
    from ray.serve.config import AutoscalingPolicy

    from serve.app import build
    from serve.scaling import policy

    application = serve_application(read(name))
    args = application.args
    found = (
        AutoscalingPolicy(**application.autoscaling_policy).get_policy() if scaled(args) else None
    )
    assert found is None or found.__name__ == policy.__name__
    assert args.ingress.num_replicas >= 2
    # On this machine, which has none of their GPUs.
    here = args.model_copy(update={"bundle": str(tiny_bundle_path), "device": "cpu"})
    app = build_app(build(here), name=application.name, default_runtime_env={})
    sizes = {d.name: d._deployment_config.autoscaling_config for d in app.deployments}
    assert set(sizes) == {"Ingress", "Sampler", *([] if args.colocated else EXPERTS)}
    for deployment, size in sizes.items():
        most = size.max_replicas if size else 1
        if deployment != "Ingress":
            own = args.sampler if deployment == "Sampler" else args.expert
            assert most == own.most


def scaled(args: Any) -> bool:
    return any(size.max_replicas for size in (args.sampler, args.expert, *args.experts.values()))


def test_serve_configs_for_machines_of_several_sizes() -> None:
    """One GPU, two to eight, none: what is reserved fits, at the least and at the most."""
    args = {name: serve_application(read(name)).args for name in SERVE_CONFIGS}
    one = args[ONE_GPU_SERVE]
    assert one.colocated and one.sampler.most * one.sampler.num_gpus == 1

    many, experts = args[GPUS_SERVE], 8
    fewest = many.sampler.num_gpus + experts * many.expert.num_gpus
    most = (
        many.sampler.most * many.sampler.num_gpus
        + experts * many.expert.most * many.expert.num_gpus
    )
    assert fewest <= 2 and most <= 8 and not many.colocated

    cpu = args[CPU_SERVE]
    assert cpu.device == "cpu" and cpu.sampler.num_gpus == cpu.expert.num_gpus == 0
    assert cpu.ingress.num_replicas * cpu.ingress.num_cpus + cpu.sampler.num_cpus <= 8
    assert 2 * cpu.sampler.num_cpus > 8

    quickstart = args["serve/config.yaml"]
    sizes = [quickstart.sampler, *[quickstart.expert] * experts]
    reserved = sum(size.num_replicas * size.num_cpus for size in (quickstart.ingress, *sizes))
    assert reserved <= 1  # of two cores: training must fit beside them


def test_a_timeout_ends_before_serves_own() -> None:
    for name in SERVE_CONFIGS:
        assert (
            serve_application(read(name)).args.timeout_s
            < read(name)["http_options"]["request_timeout_s"]
        )


def test_overridden_deployments_keep_their_size() -> None:
    """Serve replaces ray_actor_options as a whole: what is left out would be lost."""
    application = serve_application(read(RAY_SERVICE))
    assert application.deployments
    for deployment in application.deployments:
        size = getattr(application.args, deployment.name.lower())
        options = deployment.ray_actor_options
        assert (options.num_cpus, options.num_gpus) == (size.num_cpus, size.num_gpus)


# --- Which machines are started -----------------------------------------------------------------


def started(
    document: Document, demands: Sequence[tuple[Mapping[str, float], list[dict[str, str]]]]
) -> dict[str, int]:
    """Return the nodes that Ray's own scheduler starts for demands on an empty cluster.

    Args:
        document: The manifest.
        demands: Of each task its resources, and the labels that it accepts, best first.

    Raises:
        AssertionError: if a demand would wait for ever.
    """
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    equals = LabelSelectorOperator.LABEL_OPERATOR_IN
    requests = [
        ResourceRequestUtil.make(
            dict(resources),
            label_selectors=[[(k, equals, [v]) for k, v in labels.items()] for labels in selectors],
        )
        for resources, selectors in demands
    ]
    config = autoscaling_config(document)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_worker_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


ONE_GPU = {"CPU": 1, "GPU": 1}


@pytest.mark.parametrize(
    ("name", "a10g", "l40s"),
    [(AWS, "worker_a10g", "worker_l40s"), (RAY_JOB, "a10g", "l40s")],
)
def test_a_label_starts_its_kind_of_node(name: str, a10g: str, l40s: str) -> None:
    document = read(name)
    assert started(document, [(ONE_GPU, [{GPU_LABEL: "L40S"}])]) == {l40s: 1}
    assert started(document, [(ONE_GPU, [{GPU_LABEL: "A10G"}])]) == {a10g: 1}
    fallback = [{GPU_LABEL: "H100"}, {GPU_LABEL: "A10G"}]
    assert started(document, [(ONE_GPU, fallback)]) == {a10g: 1}
    with pytest.raises(AssertionError):
        started(document, [(ONE_GPU, [{GPU_LABEL: "H100"}])])
    with pytest.raises(AssertionError):
        started(document, [({"CPU": 1, "GPU": 2}, [{GPU_LABEL: "L40S"}])])


def test_labels_are_those_that_nodes_give_themselves() -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    own = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type
    names = {own("NVIDIA A10G"), own("NVIDIA L40S")}
    for name in (AWS, RAY_JOB, RAY_SERVICE):
        types = autoscaling_config(read(name)).get_node_type_configs().values()
        assert {t.labels[GPU_LABEL] for t in types if t.resources.get("GPU")} == names


def test_every_replica_of_the_service_finds_a_node() -> None:
    document = read(RAY_SERVICE)
    application = serve_application(document)
    args, (sampler,) = application.args, application.deployments
    options = sampler.ray_actor_options
    labels = [options.label_selector, *(f["label_selector"] for f in options.fallback_strategy)]
    replicas = [args.ingress] * args.ingress.num_replicas + [args.expert] * 8
    demands = [({"CPU": r.num_cpus, "GPU": r.num_gpus}, []) for r in replicas]
    demands.append(({"CPU": options.num_cpus, "GPU": options.num_gpus}, labels))
    nodes = started(document, demands)
    assert nodes["l40s"] >= 1 and sum(nodes.values()) == 3


# --- Commands -----------------------------------------------------------------------------------


def commands(name: str) -> list[list[str]]:
    """Return the arguments of every `python -m jobs...` in a file, comments included."""
    if name == RAY_JOB:
        return [shlex.split(read(name)["spec"]["entrypoint"])]
    lines = (line.removeprefix("#") for line in (REPOSITORY / name).read_text().splitlines())
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [shlex.split(found) for found in re.findall(r"\bpython -m jobs\..*", text)]


def configuration(command: Sequence[str]) -> Config:
    """Return the configuration that a command would run with.

    Raises:
        ConfigError: as the job itself would.
    """
    python, option, module, *arguments = command
    assert (python, option) == ("python", "-m")
    assert importlib.util.find_spec(module), f"there is no {module}"
    parsed = parser("").parse_args(arguments)
    return load(parsed.config, parsed.overrides)


@pytest.mark.parametrize("name", [AWS, LOCAL, README, RAY_JOB])
def test_commands_would_run(name: str) -> None:
    assert commands(name)
    for command in commands(name):
        configuration(command)


@pytest.mark.parametrize("name", [AWS, LOCAL, README, RAY_JOB])
def test_commands_survive_ray_job_submit(name: str) -> None:
    for command in commands(name):
        assert shlex.split(list2cmdline(command)) == command


@pytest.mark.parametrize(
    "override",
    ["training.lables={a: b}", "training.labels=L40S", "experts.8.training.num_gpus=1", "steps"],
)
def test_a_broken_override_in_a_command_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        configuration([*shlex.split("python -m jobs.pipeline --config quickstart"), override])


def test_a_job_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"jobs\.trian"):
        configuration(["python", "-m", "jobs.trian"])


@pytest.mark.parametrize("selector", ['"in(L40S, H100)"', '"!A10G"'])
def test_label_selectors_of_the_readme_are_read(selector: str) -> None:
    from ray._private.label_utils import validate_label_selector

    assert f"`{selector}`" in (REPOSITORY / README).read_text()
    config = load("quickstart", [f"training.labels={{{GPU_LABEL}: {selector}}}"])
    assert config.training.labels == {GPU_LABEL: selector.strip('"')}
    assert validate_label_selector(config.training.labels) is None


def test_paths_in_submitted_commands_are_absolute() -> None:
    for name in (AWS, LOCAL, RAY_JOB):
        for command in commands(name):
            config = configuration(command)
            for path in (config.run_dir, config.corpus.path):
                assert path is not None and ("://" in path or Path(path).is_absolute())


@pytest.mark.parametrize(
    ("name", "expected"),
    [(AWS, {"worker_l40s": 6, "worker_a10g": 2}), (RAY_JOB, {"l40s": 6, "a10g": 2})],
)
def test_unlike_experts_find_their_machines(name: str, expected: dict[str, int]) -> None:
    config = configuration(commands(name)[-1])
    trainings = [expert_setup(config, k).training for k in range(config.cluster.num_clusters)]
    demands = [
        ({"CPU": t.num_cpus, "GPU": t.num_gpus}, [t.labels, *t.fallback_labels]) for t in trainings
    ]
    assert started(read(name), demands) == expected
