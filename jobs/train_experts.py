"""Train one expert a cluster, as isolated Ray tasks.

Writes experts/expert_k/. Interrupted experts continue from their last checkpoint.

    python -m jobs.train_experts --config quickstart run_dir=runs/mine
    python -m jobs.train_experts --config paris_xl2 --dry-run

The second shows what training will take, and on which GPUs each expert fits; it starts nothing.
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "train_experts")
