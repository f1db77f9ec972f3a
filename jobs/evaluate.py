"""Draw the training captions and measure caption accuracy.

Writes evaluation/ (see evaluation/report.html).

    python -m jobs.evaluate --config quickstart run_dir=runs/mine
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "evaluate")
