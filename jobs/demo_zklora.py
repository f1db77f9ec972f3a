"""ZKLoRA on one machine: a LoRA is tried, proved, paid for and received, and then drawn with.

    make demo-zklora        or        python -m jobs.demo_zklora

Trains a LoRA for one expert of the quickstart's bundle, which is made first if there is none. Then
an escrow, a contributor and a user, each a process of its own, the latter two with Ray clusters of
their own, do business over loopback. What is finished already is kept.
"""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.command import fail
from jobs.local_cluster import LOOPBACK, LocalCluster
from jobs.parties import CLIENTS
from jobs.processes import run_job, service, stop_on_sigterm
from paris_ray import reports
from paris_ray.artifacts import Folder, read_manifest
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import load, with_absolute_paths
from paris_ray.embeddings import read_table
from paris_ray.errors import ParisError
from paris_ray.receipts import RECEIPT, Receipt
from paris_ray.run import BUNDLE, Run
from paris_ray.sampling import generate
from paris_ray.sampling.sampler import sample, sampling_options
from paris_ray.zklora.identity import CERTIFICATE, Identity
from paris_ray.zklora.manifest import MANIFEST

