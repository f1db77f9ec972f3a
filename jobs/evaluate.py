"""Draw captions that were trained on and captions that were held out, and measure.

Writes evaluation/ (see evaluation/report.html; docs/evaluation.md says what each measure is).

    python -m jobs.evaluate --config quickstart run_dir=runs/mine
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "evaluate")
