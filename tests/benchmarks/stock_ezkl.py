"""Print what EZKL takes with its own settings, calibrated, as its documentation uses it.

    python tests/benchmarks/stock_ezkl.py D_IN R D_OUT

One row of floats, weights committed. One line is JSON: CPU seconds of all threads, and the size of
the proof; calibration prints the others.
"""

import asyncio
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ezkl
import numpy as np
import onnx
from onnx import helper, numpy_helper


def write_graph(d_in: int, r: int, d_out: int) -> None:
    """Write a random module of normal size as an ONNX graph, and a row for it."""
    random = np.random.default_rng(0)
    sizes = {"a": (d_in, r), "b": (r, d_out)}
    factors = [
        numpy_helper.from_array((random.standard_normal(size) / 32).astype(np.float32), name)
        for name, size in sizes.items()
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, width])
        for name, width in (("x", d_in), ("y", d_out))
    ]
    products = [
        helper.make_node("MatMul", ["x", "a"], ["u"]),
        helper.make_node("MatMul", ["u", "b"], ["y"]),
    ]
    graph = helper.make_graph(products, "lora", ends[:1], ends[1:], factors)
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), "graph")
    Path("row").write_text(json.dumps({"input_data": [random.standard_normal(d_in).tolist()]}))


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Return the CPU time of a call; some of EZKL's want a running event loop."""

    async def run() -> None:
        answer = call()
        if inspect.isawaitable(answer):
            await answer

    started = time.process_time()
    asyncio.run(run())
    return time.process_time() - started


def main() -> None:
    """Go through EZKL's steps."""
    write_graph(*map(int, sys.argv[1:]))
    arguments = ezkl.PyRunArgs()
    arguments.input_visibility = arguments.output_visibility = "public"
    arguments.param_visibility = "polycommit"
    ezkl.gen_settings("graph", "settings", py_run_args=arguments)
    cpu_seconds(lambda: ezkl.calibrate_settings("row", "graph", "settings", "resources"))
    log_rows = json.loads(Path("settings").read_text())["run_args"]["logrows"]

    def set_up() -> None:
        ezkl.compile_circuit("graph", "circuit", "settings")
        ezkl.gen_srs("srs", log_rows)
        ezkl.setup("circuit", "verifying_key", "proving_key", "srs")

    steps = {
        "set_up": set_up,
        "witness": lambda: ezkl.gen_witness("row", "circuit", "witness", "verifying_key", "srs"),
        "prove": lambda: ezkl.prove("witness", "circuit", "proving_key", "proof", "srs"),
        "verify": lambda: ezkl.verify("proof", "settings", "verifying_key", "srs"),
    }
    figures: dict[str, float] = {name: cpu_seconds(step) for name, step in steps.items()}
    figures["prove"] += figures.pop("witness")
    proof = json.loads(Path("proof").read_text())["proof"]
    figures["proof_bytes"] = len(proof)
    print(json.dumps(figures))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
        os.chdir("/")
