r"""All stages in order: prepare, train_seed, train_experts, train_router, evaluate, export.

    python -m jobs.pipeline --config quickstart run_dir=runs/mine
    python -m jobs.pipeline --config quickstart corpus.kind=image_folder corpus.path=/data/mine \
        run_dir=runs/mine

On a cluster (paths must be absolute there):

    ray job submit --working-dir . -- python -m jobs.pipeline run_dir=$PWD/runs/mine

What it will take (memory, disk, steps, days and dollars), without starting anything:

    python -m jobs.pipeline --config paris_xl2 --dry-run

Finished stages are kept and said to be; an interrupted one continues where it was.
docs/training.md leads from no data to a trained XL/2.
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "pipeline")
