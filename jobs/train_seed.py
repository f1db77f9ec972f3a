"""Train the seed, a model of everything from which all experts start, as one Ray task.

Writes seed/. Without `seed_training.steps` there is none, and experts start from scratch.

    python -m jobs.train_seed --config quickstart run_dir=runs/mine seed_training.steps=1280
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "train_seed")
