"""Put experts, router, codec and text encoder into one model folder.

Writes bundle/, in the layout of the public Paris release. Run evaluate first to have its numbers in
the model card.

    python -m jobs.export --config quickstart run_dir=runs/mine
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "export")
