r"""Examine an expert from a stranger before it may enter a bundle; sign what was found.

    python -m jobs.admit_expert --expert FOLDER --index K --bundle runs/quickstart/bundle \
        --identity runs/me --output VERDICT --config quickstart run_dir=runs/quickstart

FOLDER has the expert's config.json and safetensors. K is the number that it would have: that of
the expert in whose place it would come, or the next one. The run of --config has trained all
others, and has held-out rows of all clusters, the candidate's with them: --cluster tells which of
the run's that is, if the bundle numbers its experts in another way. --shard tells what the expert
was trained on, if its maker shows it. Writes verdict.json, signed with the key of --identity
(jobs.identity makes one), and verdict.html. Needs no Ray, and at no time asks the router.

Exit code 0: admitted. 3: flagged. 2: it could not be examined.
"""

import argparse
import logging
import secrets
import sys
from pathlib import Path

import torch

from jobs.command import fail, log_to_stdout
from paris_ray.artifacts import VerifiedFolder, canonical_json
from paris_ray.bundle import bundle_digest, load_bundle
from paris_ray.config import load
from paris_ray.encoders.images import OPEN_CLIP_FILES, load_features
from paris_ray.errors import ParisError
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.model_folder.admissions import VERDICT, parse_admission
from paris_ray.roster.admission.copies import read_shard
from paris_ray.roster.admission.drawings import Look
from paris_ray.roster.admission.page import verdict_page
from paris_ray.roster.admission.panel import held_out_shards, read_held_out
from paris_ray.roster.admission.readings import Check
from paris_ray.roster.admission.verdict import examine, open_panel, read_candidate, sign_verdict
from paris_ray.roster.newcomer import check_encoders
from paris_ray.run import Run

EXIT_FLAGGED = 3  # not 1, with which a crash ends
PAGE = "verdict.html"
SEED_BITS = 63

logger = logging.getLogger("paris_ray")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    log_to_stdout()
    torch.set_num_threads(options.threads)
    try:
        return _admit(options)
    except ParisError as error:
        return fail(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--expert", required=True, help="path or URI of the expert's folder")
    parser.add_argument("--index", required=True, type=int, help="the number it would have")
    parser.add_argument("--cluster", type=int, help="the run's that it would stand for (--index)")
    parser.add_argument("--bundle", required=True, help="path or URI of the bundle")
    parser.add_argument("--config", default="quickstart", help="of the run with held-out rows")
    parser.add_argument("--shard", help="path or URI of what the expert was trained on")
    parser.add_argument("--identity", required=True, type=Path, help="folder of your key")
    parser.add_argument("--output", required=True, help="folder for the verdict")
    parser.add_argument("--words", type=int, default=500, help="tried as triggers (500)")
    parser.add_argument("--seed", type=int, help="to repeat an examination: its verdict tells it")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run_dir=PATH")
    return parser


def _admit(options: argparse.Namespace) -> int:
    identity = Identity.load(options.identity)
    run = Run(load(options.config, options.overrides))
    digest = bundle_digest(options.bundle)
    bundle = load_bundle(options.bundle, digest, dtype="float32")
    check_encoders(bundle, run.encoders)
    candidate = read_candidate(options.expert, bundle)
    shards = held_out_shards(bundle, run, options.index, options.cluster)
    held_out = read_held_out(shards, options.index)
    # A seed that nobody knew beforehand: the words that are tried depend on it.
    seed = secrets.randbits(SEED_BITS) if options.seed is None else options.seed
    panel = open_panel(candidate, options.index, bundle, held_out, seed)
    shard = None if options.shard is None else read_shard(Folder(options.shard))
    findings = examine(panel, open_look(run), shard=shard, num_words=options.words, on_check=_log)
    output = Folder(options.output)
    verdict = canonical_json(sign_verdict(findings, candidate, panel, digest, identity).to_json())
    signed = parse_admission(verdict, f"{output.uri}/{VERDICT}")  # before it is written
    output.write(VERDICT, verdict)
    attribution = bundle.facts.attribution
    output.write(PAGE, verdict_page(*signed, findings.pictures, attribution))
    logger.info("%s: %s/%s", signed.admission.outcome, output.uri, PAGE)
    return EXIT_FLAGGED if findings.is_flagged else 0


def open_look(run: Run) -> Look:
    """Return the run's image model, as a function from pictures to features."""
    trained = None
    if run.config.features.checkpoint is None:
        trained = VerifiedFolder(run.encoders / "features", None).local_path(OPEN_CLIP_FILES)
    return load_features(run.config.features, trained).to(torch.device("cpu")).encode


def _log(check: Check) -> None:
    logger.info("%s: %s (%s)", check.name, check.outcome, check.note)
    for reading in check.readings:
        mark = "!" if reading.is_flagged else " "
        found = f"{reading.value:.3f}, at most {reading.limit:g} {reading.detail}"
        logger.info(" %s %s: %s", mark, reading.measure, found)


if __name__ == "__main__":
    sys.exit(main())
