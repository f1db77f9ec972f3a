"""An expert that joins a bundle: its files, the rows that it was trained on, what to tell of it."""

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paris_ray.artifacts import MANIFEST, VerifiedFolder, open_finished, read_manifest
from paris_ray.bundle import Bundle
from paris_ray.bundle.weights import StoredModel
from paris_ray.cluster_facts import MAX_WORD_LENGTH, TOLD_PICTURES, TOLD_WORDS, ClusterFacts
from paris_ray.embeddings import column_names, read_rows
from paris_ray.encoders.folders import TEXT_ENCODER, TOKENIZER
from paris_ray.errors import ArtifactError, BundleError
from paris_ray.folders import Folder
from paris_ray.model_folder.admissions import VERDICT, read_verdict, require_admitted
from paris_ray.model_folder.links import check_links
from paris_ray.models import Expert
from paris_ray.reports import count_words, telling_words
from paris_ray.roster.sample import Shard
from paris_ray.run import CODEC_FOLDERS, ENCODERS, EXPERT, EXPERT_WEIGHTS, MODEL_CONFIG

logger = logging.getLogger("paris_ray")

THUMBNAIL = "thumbnail"
MAX_CAPTIONS = 1000  # of a cluster, of which words are counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Newcomer:
    """An expert that joins.

    Attributes:
        part: Its `config.json` and weights.
        weights: SHA-256 of these.
        shard: What it was trained on.
        verdict: The signed verdict of its examination, if there was one.
    """

    part: VerifiedFolder
    weights: str
    shard: Shard
    verdict: bytes | None = None

    @classmethod
    def open(
        cls, folder: Folder, rows: Folder, verdict: Folder | None = None, examiner: str = ""
    ) -> "Newcomer":
        """Return the expert in a folder, with its rows.

        Args:
            folder: Of a run's expert, whose manifest is then kept to; or any with the two files.
            rows: Its shard.
            verdict: What `jobs.admit_expert` wrote of it.
            examiner: Whose verdict that has to be: a public key in hexadecimal.

        Raises:
            ArtifactError: if a file is missing, or the manifest names another shard.
            BundleError: if a link leaves the folder, or the verdict does not let it enter.
        """
        if folder.is_local:
            check_links(folder)
        shard, weights = Shard.open(rows), folder.sha256(EXPERT_WEIGHTS)
        part = VerifiedFolder(folder, None)
        if folder.exists(MANIFEST):
            if read_manifest(folder, EXPERT).parents.get("shard") != shard.digest:
                raise ArtifactError(f"{folder.uri} was trained on another shard than {rows.uri}")
            part = open_finished(folder, EXPERT)
        read = None if verdict is None else _read_verdict(verdict, part, examiner)
        return cls(part=part, weights=weights, shard=shard, verdict=read)

    def check_fits(self, bundle: Bundle) -> None:
        """Refuse an expert that cannot draw with those of a bundle.

        Raises:
            BundleError: if its architecture, weights or encoders do not fit.
            ArtifactError: if its weights are not the published ones.
        """
        channels, size, _ = bundle.latent_shape
        defaults = {"in_channels": channels, "input_size": size}
        stored = StoredModel(Expert, self.part, defaults=defaults)
        wanted = defaults | {"text_embed_dim": bundle.expert_configs[0].text_embed_dim}
        for field, value in wanted.items():
            found = getattr(stored.config, field)
            if found != value:
                where = f"{self.part.folder.uri}/{MODEL_CONFIG}"
                raise BundleError(
                    f"{where}: {field}={found} is not allowed: {value}, as the others"
                )
        stored.load(torch.device("cpu"))
        run, _, place = self.part.folder.uri.rpartition("/experts/")
        if "/" not in place and run:
            check_encoders(bundle, Folder(run) / ENCODERS)
        else:
            logger.warning("roster: %s is in no run: its encoders are not known", place)


def _read_verdict(folder: Folder, expert: VerifiedFolder, examiner: str) -> bytes:
    where, payload = f"{folder.uri}/{VERDICT}", read_verdict(VerifiedFolder(folder, None), VERDICT)
    signer = require_admitted(payload, where, expert).public_key
    if signer != examiner:
        raise BundleError(f"{where} is signed by {signer}, not by {examiner or 'anybody known'}")
    return payload


def check_encoders(bundle: Bundle, encoders: Folder) -> None:
    """Compare codec and text encoder of a run with a bundle's, where both are known.

    Raises:
        BundleError: naming the file that differs.
    """
    if not encoders.exists(MANIFEST):
        logger.info("roster: there are no %s to compare the bundle's with", encoders.uri)
        return
    theirs = read_manifest(encoders, ENCODERS).files
    for part in {*CODEC_FOLDERS.values(), TEXT_ENCODER, TOKENIZER} & bundle.parts.keys():
        for name, digest in (bundle.parts[part].digests or {}).items():
            if theirs.get(f"{part}/{name}") != digest:
                raise BundleError(
                    f"{encoders.uri}/{part}/{name} is not the bundle's: experts of one bundle have "
                    "one codec and one text encoder"
                )


def describe(shard: Shard, others: Sequence[Shard]) -> ClusterFacts:
    """Return what a bundle tells of a cluster: words that others say less often, some pictures.

    Raises:
        ArtifactError: if a shard has no captions.
    """
    captions = [_spread(each, "caption", MAX_CAPTIONS) for each in (shard, *others)]
    counts, sizes = [count_words(texts) for texts in captions], [len(texts) for texts in captions]
    words = telling_words(counts, sizes, TOLD_WORDS)[0]
    has_pictures = THUMBNAIL in column_names(shard.folder)
    pictures = _spread(shard, THUMBNAIL, TOLD_PICTURES) if has_pictures else []
    return ClusterFacts(
        rows=shard.count,
        words=[word[:MAX_WORD_LENGTH] for word in words],
        pictures=[base64.b64encode(png).decode() for png in pictures],
    )


def _spread(shard: Shard, column: str, most: int) -> list[Any]:
    count = min(shard.count, most)
    rows = np.arange(count) * shard.count // count
    return read_rows(shard.folder, rows, [column])[column].to_pylist()
