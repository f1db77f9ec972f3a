"""From nothing to pictures over HTTP, on one machine.

    make quickstart        or        python -m jobs.quickstart [key=value ...]

Starts a Ray head of its own, submits the pipeline with `ray job submit`, deploys the Serve
application from the new bundle, and asks it for a grid of pictures. What is finished already is
kept. `make stop` stops the Ray head.
"""

import argparse
import base64
import io
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
import yaml
from PIL import Image

from jobs.command import fail
from jobs.local_cluster import LOOPBACK, LocalCluster, port_is_free
from paris_ray import reports
from paris_ray.artifacts import read_manifest
from paris_ray.config import load, run_folder, to_yaml, with_absolute_paths
from paris_ray.embeddings import read_table
from paris_ray.errors import ParisError
from paris_ray.evaluation.summary import headline
from paris_ray.run import BUNDLE, EMBEDDINGS, EVALUATION, Run

REPOSITORY = Path(__file__).resolve().parents[1]
# Held-out captions are of (object, background) pairs that no training caption has.
NUM_CAPTIONS = 28
# Wordings, too, that the corpus does not have; every one asks for a pair that may be held out.
FREE_PROMPTS = (
    "a purple cat on the left, yellow background",
    "blue apple, pink background, on the right",
    "draw me a green elephant on an orange background",
    "a white star against a red background",
    "pink car on the left side of a blue background",
    "orange turtle on white",
    "a yellow house in the middle of a purple background",
    "red fish at the right on a green background",
    "there is a blue heart on a yellow background",
    "a purple rocket, on the left, orange background",
    "white ghost and a blue background",
    "a pink umbrella on a green background, on the right",
)
DEPLOY_TIMEOUT_S = 600  # a dozen processes import torch, perhaps beside other work
REQUEST_TIMEOUT_S = 120
COLUMNS = 8


def main() -> int:
    """Run all steps; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the API (default 8000)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        run = Run(with_absolute_paths(load("quickstart", arguments.overrides)))
        cluster = LocalCluster(Path(run.folder.uri))
        _start_cluster(cluster, arguments.port)
        _submit_pipeline(cluster, run)
        _deploy(cluster, run, arguments.port)
        _draw_samples(run, f"http://{LOOPBACK}:{arguments.port}")
    except ParisError as error:
        return fail(error)
    _say_what_there_is(run, cluster, arguments.port, time.monotonic() - started)
    return 0


def _start_cluster(cluster: LocalCluster, port: int) -> None:
    if cluster.is_running():
        print(f"Ray is running already: {cluster.dashboard_url}", flush=True)
        return
    if not port_is_free(port):
        raise ParisError(f"--port={port} is in use: stop what listens there or choose another")
    print("starting Ray ...", flush=True)
    cluster.start()


def _submit_pipeline(cluster: LocalCluster, run: Run) -> None:
    """Submit the pipeline as a Ray job, with absolute paths, and follow its log."""
    config_file = Path(run.folder.uri) / "quickstart.yaml"
    config_file.write_text(to_yaml(run.config))
    entrypoint = [sys.executable, "-m", "jobs.pipeline", "--config", str(config_file)]
    command = [str(Path(sys.executable).parent / "ray"), "job"]
    running = _running_job(cluster, str(config_file))
    if running is None:
        command += ["submit", "--working-dir", str(REPOSITORY), "--", *entrypoint]
    else:  # whoever submitted it was interrupted; two at once would write to the same folders
        print(f"following {running}, which runs already", flush=True)
        command += ["logs", "--follow", running]
    environment, errors = cluster.environment(), subprocess.PIPE
    done = subprocess.run(command, env=environment, stderr=errors, text=True, check=False)
    if done.returncode:
        raise ParisError(why_it_failed(done.stderr))


def why_it_failed(errors: str) -> str:
    """Return what to tell of what `ray job` wrote to stderr."""
    if "status code 413" in errors:  # Ray's traceback names neither the folder nor a remedy
        return (
            f"{REPOSITORY} holds more than the 100 MiB that Ray sends with a job: move what is no "
            "code out of jobs/, paris_ray/ and serve/, or name it in .rayignore"
        )
    print(errors, file=sys.stderr, end="")
    return "the pipeline job failed: its log is above and in the Ray dashboard"


def _running_job(cluster: LocalCluster, config_file: str) -> str | None:
    """Return the submission id of a job that works on this very run, if there is one."""
    url = f"{cluster.dashboard_url}/api/jobs/"
    for job in requests.get(url, headers=cluster.headers(), timeout=10).json():
        if config_file in job["entrypoint"] and job["status"] in ("PENDING", "RUNNING"):
            return str(job["submission_id"])
    return None


def _deploy(cluster: LocalCluster, run: Run, port: int) -> None:
    """Deploy the Serve application on the new bundle and wait until it answers."""
    document = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    document["http_options"]["port"] = port
    digest = read_manifest(run.bundle, BUNDLE).digest
    # On one machine experts are lost together: what waits for one alone is not worth its memory.
    own = {"bundle": run.bundle.uri, "bundle_digest": digest, "last_resort": False}
    document["applications"][0]["args"] |= own
    config_file = Path(run.folder.uri) / "serve.yaml"
    config_file.write_text(yaml.safe_dump(document, sort_keys=False))
    print("deploying the Serve application ...", flush=True)
    serve = str(Path(sys.executable).parent / "serve")
    command = [serve, "deploy", "--address", cluster.dashboard_url, str(config_file)]
    if subprocess.run(command, env=cluster.environment(), cwd=REPOSITORY, check=False).returncode:
        raise ParisError(f"serve deploy {config_file} failed")
    deadline = time.monotonic() + DEPLOY_TIMEOUT_S
    while not _is_healthy(f"http://{LOOPBACK}:{port}"):
        if time.monotonic() > deadline:
            raise ParisError(f"the application is not up after {DEPLOY_TIMEOUT_S} s: serve status")
        time.sleep(1)


def _is_healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/healthz", timeout=5).ok
    except requests.RequestException:
        return False


def _draw_samples(run: Run, url: str) -> None:
    """Ask the API for pictures; write `samples.png` and `report.html`."""
    prompts = [*_captions(run), *FREE_PROMPTS]
    with ThreadPoolExecutor(max_workers=COLUMNS) as pool:
        images = list(pool.map(lambda prompt: _request_image(url, prompt), prompts))
    grid = reports.picture_grid(np.stack(images), columns=COLUMNS, scale=4)
    run.folder.write("samples.png", reports.png_bytes(grid))
    run.folder.write("report.html", _report(run, prompts, images))


def _captions(run: Run) -> list[str]:
    """Return captions that were never trained on or, if none was held out, some that were."""
    folder = run.held_out if _holds_out(run) else run.embeddings
    captions = read_table(folder, ["caption"])["caption"].to_pylist()
    chosen = np.linspace(0, len(captions) - 1, min(NUM_CAPTIONS, len(captions))).astype(int)
    return [captions[i] for i in chosen]


def _holds_out(run: Run) -> bool:
    return bool(read_manifest(run.embeddings, EMBEDDINGS).facts["held_out"])


def _request_image(url: str, prompt: str) -> np.ndarray:
    response = requests.post(
        f"{url}/v1/images/generations",
        json={"prompt": prompt, "seed": 0},
        timeout=REQUEST_TIMEOUT_S,
    )
    if not response.ok:
        raise ParisError(f"the API answered {response.status_code}: {response.text}")
    encoded = base64.b64decode(response.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _report(run: Run, prompts: list[str], images: list[np.ndarray]) -> bytes:
    figures = [reports.figure(Image.fromarray(i), p) for p, i in zip(prompts, images, strict=True)]
    num_captions = len(prompts) - len(FREE_PROMPTS)
    title = "Captions that were never shown" if _holds_out(run) else "Captions of the corpus"
    measured = headline(read_manifest(run.evaluation, EVALUATION).facts)
    sections = [
        reports.section(title, *figures[:num_captions]),
        reports.section("Free prompts", *figures[num_captions:]),
        reports.section("Measured", *map(reports.paragraph, measured)),
    ]
    attribution = read_manifest(run.embeddings, EMBEDDINGS).facts["attribution"]
    return reports.page("paris_ray quickstart", sections, attribution)


def _say_what_there_is(run: Run, cluster: LocalCluster, port: int, seconds: float) -> None:
    mark = REPOSITORY / ".venv" / "quickstart"
    installed = f", after {mark.read_text().strip()} s of installation" if mark.exists() else ""
    measured = "\n".join(
        f"  {line}" for line in headline(read_manifest(run.evaluation, EVALUATION).facts)
    )
    print(
        f"""
done in {seconds:.0f} s{installed}

{measured}

  pictures           {run.folder.uri}/samples.png
  report             {run.folder.uri}/report.html
  page and API       http://{LOOPBACK}:{port}/   (POST /v1/images/generations)
  curves, samples    python -m jobs.watch {shlex.quote(run.folder.uri)}
  Ray dashboard      {cluster.dashboard_url}   (token: {cluster.token_file})
  stop               {_stop_command(run)}

{read_manifest(run.embeddings, EMBEDDINGS).facts["attribution"]}""",
        flush=True,
    )


def _stop_command(run: Run) -> str:
    usual = run_folder(with_absolute_paths(load("quickstart")))
    return "make stop" if run.folder.uri == usual else f"python -m jobs.stop {run.folder.uri}"


if __name__ == "__main__":
    sys.exit(main())
