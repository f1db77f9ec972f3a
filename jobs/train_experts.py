"""Train one expert a cluster, as isolated Ray tasks.

Writes experts/expert_k/. Interrupted experts continue from their last checkpoint.

    python -m jobs.train_experts --config quickstart run_dir=runs/mine
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "train_experts")
