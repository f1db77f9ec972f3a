r"""Train a LoRA: a small adapter of one expert of a finished bundle, which stays as it is.

Writes adapter_config.json and adapter_model.safetensors, which the peft library loads too, and
beside them samples, metrics and the encoded pictures. Run it again to continue after an
interruption. docs/lora.md says how to draw with it.

    python -m jobs.train_lora --bundle runs/quickstart/bundle --expert 3 \
        --data PICTURES --output loras/mine training.steps=200
"""

import argparse

from jobs.command import (
    described,
    log_to_stdout,
    ray_session,
    refuse_absent_config,
    refuse_relative_paths,
    refuse_unreachable,
    reported,
)
from paris_ray.config import load_lora


def main() -> None:
    """Train an adapter."""
    arguments = _parser().parse_intermixed_args()
    log_to_stdout()
    with reported():
        refuse_absent_config(arguments.config)
        run = load_lora(arguments.config, arguments.overrides)
        paths = {name: getattr(arguments, name) for name in ("bundle", "data", "output")}
        options = {f"--{name}": path for name, path in paths.items()}
        refuse_relative_paths(options)
        refuse_unreachable(options)
        with ray_session(arguments.address):
            # Imported only now: ray reads RAY_AUTH_MODE when it is imported, and --help is quick.
            from paris_ray.pipeline.lora import train_lora

            train_lora(run, expert=arguments.expert, **paths)


def _parser() -> argparse.ArgumentParser:
    result = described(__doc__)
    result.add_argument("--bundle", required=True, help="a model folder: a path or a URI")
    result.add_argument("--expert", required=True, type=int, help="number of the expert to adapt")
    result.add_argument(
        "--data",
        required=True,
        help="captioned pictures, a path or URI; any layout of docs/training.md is recognised",
    )
    result.add_argument("--output", required=True, help="a new folder for the adapter")
    result.add_argument("--config", default="lora", help="a YAML file; default: the packaged one")
    result.add_argument(
        "--address", help="Ray cluster; default: RAY_ADDRESS, else a Ray of its own"
    )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as lora.r=8")
    return result


if __name__ == "__main__":
    main()
