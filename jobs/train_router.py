"""Train the router on the shards of all clusters.

Writes router/. It needs clusters/ alone, so it may run at the same time as train_experts.

    python -m jobs.train_router --config quickstart run_dir=runs/mine
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "train_router")
