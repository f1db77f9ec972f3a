"""Encode a captioned corpus with Ray Data and cut it into clusters.

Writes encoders/, embeddings/, quarantine/ and clusters/ (see clusters/report.html).

    python -m jobs.prepare --config quickstart run_dir=runs/mine
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "prepare")
