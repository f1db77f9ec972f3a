"""Distil the ensemble of a finished run into one expert, which is a bundle of its own.

Writes distilled/: student/, trained on what the experts and then the routed ensemble answer;
few_step/, if `distillation.num_inference_steps` is given, which draws in so few steps; both
measured like the ensemble (evaluation/, made first if there is none yet); bundle/, the last of
them, which serves like any other. Not part of jobs.pipeline; `--dry-run` plans it after the run.

    python -m jobs.distil --config quickstart run_dir=runs/quickstart
    python -m jobs.distil --config quickstart run_dir=runs/quickstart distil_training.steps=100
"""

from jobs.command import run_job

if __name__ == "__main__":
    run_job(__doc__ or "", "distil")
