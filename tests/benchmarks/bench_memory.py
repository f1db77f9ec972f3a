"""Print how much resident memory grows while a bundle of eight S/2 experts loads.

    python tests/benchmarks/bench_memory.py        (results.py does)

Every parameter is read, so that no page of the files is left on the disk.
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import psutil
import safetensors.torch
import torch

from paris_ray.bundle import load_bundle
from paris_ray.config import Dtype, ExpertConfig, RouterConfig
from paris_ray.config.release import write_document
from paris_ray.folders import Folder
from paris_ray.models import Expert, Router
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG, ROUTER_WEIGHTS

NUM_EXPERTS = 8


def write_bundle(path: str) -> None:
    """Write eight random S/2 experts and a router of that width; the encoders stay empty."""
    expert = Expert(ExpertConfig.preset("S/2"))
    router = Router(RouterConfig(hidden_size=384, num_layers=12, num_heads=6))
    models = [(f"expert_{k}", expert, EXPERT_WEIGHTS) for k in range(NUM_EXPERTS)]
    for name, model, weights in [*models, ("router", router, ROUTER_WEIGHTS)]:
        part = Folder(path) / name
        part.write_json(MODEL_CONFIG, write_document(model.config))
        part.write(weights, safetensors.torch.save(model.state_dict()))
    Folder(path).write_json("codec/config.json", {"kind": "patch_pca"})
    Folder(path).write_json("text_encoder/config.json", {"model_type": "bert"})
    for name in ("codec/codec.safetensors", "text_encoder/model.safetensors"):
        Folder(path).write(name, safetensors.torch.save({}))
    facts = {"model_name": "bench", "num_experts": NUM_EXPERTS, "image_size": 32}
    ours = {"sampling": {}, "picture_size": 256, "attribution": None, "example_prompts": []}
    Folder(path).write_json("config.json", facts | {"num_channels": 4, "paris_ray": ours})
    Folder(path).write_json("model_index.json", {"num_experts": NUM_EXPERTS})


def print_growth(path: str, dtype: Dtype | None) -> None:
    """Load the bundle, read every parameter, and print the growth of memory over its files."""
    size = sum(file.stat().st_size for file in Path(path).rglob("*.safetensors"))
    _ = torch.zeros(4, 4) @ torch.zeros(4, 4)  # what torch itself takes when it is first used
    process = psutil.Process()
    before = process.memory_info().rss
    bundle = load_bundle(path, dtype=dtype)
    models = [bundle.router, *(bundle.expert(k) for k in range(NUM_EXPERTS))]
    for parameter in (p for model in models for p in model.parameters()):
        parameter.detach().float().sum()
    growth = (process.memory_info().rss - before) / size
    goal = " (goal <= 1.1)" if dtype is None else ""
    print(f"{dtype or 'stored dtype'}: {growth:.3f} of {size / 1e9:.2f} GB{goal}", flush=True)


def main() -> None:
    """Write and load in processes of their own, whose memory begins low."""
    print("\n## Growth of resident memory while 8 x S/2 load, over the size of their files\n")
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as path:
        arguments: list[tuple[str, Dtype | None]] = [(path, None), (path, "bfloat16")]
        tasks = [processes.Process(target=write_bundle, args=(path,))]
        tasks += [processes.Process(target=print_growth, args=each) for each in arguments]
        for task in tasks:
            task.start()
            task.join()
            if task.exitcode:
                sys.exit(task.exitcode)


if __name__ == "__main__":
    main()
