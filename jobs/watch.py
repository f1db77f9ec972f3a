"""Watch a training on a page: curves, sample grids, clusters, router, rates and cost.

    python -m jobs.watch runs/quickstart
    python -m jobs.watch s3://bucket/runs/xl2 s3://bucket/runs/other     # two, side by side

It reads the run folder alone, on any storage, while others write there or long after, and writes
nothing. The address that it prints is this machine's; from elsewhere use a tunnel (ssh -L), or
`--host` with `--api-key-file`.
"""

import argparse
import math
from pathlib import Path

from jobs.command import log_to_stdout, refuse_unreachable, reported
from paris_ray.errors import ConfigError

USUAL_PORT = 8270


def main() -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or that of an adapter")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another, to compare with")
    parser.add_argument("--host", default="127.0.0.1", help="beyond loopback with keys only")
    parser.add_argument("--port", type=int, help=f"default: {USUAL_PORT}, or any if it is taken")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="who may watch: jobs.new_key writes it"
    )
    parser.add_argument(
        "--dollars-per-hour", type=float, metavar="D", help="of a device; default: the run's fleet"
    )
    arguments = parser.parse_args()
    log_to_stdout()
    with reported():
        _watch(arguments)


def _watch(arguments: argparse.Namespace) -> None:
    # Imported only now: --help is quick.
    from paris_ray.api_keys import read_keys
    from paris_ray.watching.runs import WatchedRun, check_run
    from paris_ray.watching.server import listen, serve, watch_app

    given = {"RUN": arguments.run, "OTHER": arguments.other}
    places = {name: place for name, place in given.items() if place is not None}
    refuse_unreachable(places)
    for name, place in places.items():
        check_run(name, place)
    keys = None if arguments.api_key_file is None else read_keys(arguments.api_key_file)
    price = arguments.dollars_per_hour
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--dollars-per-hour={price} is not allowed: 0 or more")
    runs = [WatchedRun(place, dollars_per_hour=price) for place in places.values()]
    listener = listen(arguments.host, arguments.port, keyless=keys is None, usual_port=USUAL_PORT)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"watching at http://{host}:{listener.getsockname()[1]}/   (Ctrl-C ends)", flush=True)
    serve(watch_app(runs, keys), listener)


if __name__ == "__main__":
    main()
