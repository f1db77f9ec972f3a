"""Stop the Ray head that quickstart started, with all its processes, and nothing else.

make stop        or        python -m jobs.stop [RUN_DIR]
"""

import sys
from pathlib import Path

from jobs.local_cluster import LocalCluster
from paris_ray.config import load, run_folder

if __name__ == "__main__":
    run_dir = sys.argv[1] if len(sys.argv) > 1 else run_folder(load("quickstart"))
    stopped = LocalCluster(Path(run_dir)).stop()
    print("stopped" if stopped else f"nothing to stop: no Ray of ours runs for {run_dir}")
