"""The bundle: a model folder in the layout of the public Paris release.

    config.json  model_index.json  [README.md  manifest.json  history.json]
    expert_0/ ... expert_K-1/   config.json  diffusion_pytorch_model.safetensors
    router/                     config.json  pytorch_model.safetensors
    vae/                        diffusers' AutoencoderKL; or codec/, our own
    text_encoder/  [tokenizer/] transformers' CLIP; or MiniLM, which needs no second folder
    [clusters/]                 clusters.json: what each expert was trained on, for people
    [admissions/]               expert_K.json: signed verdicts on experts that came from strangers

The release itself is read as it is. Fields of our own stand under `paris_ray` in `config.json`.
Parts load when they are first used, so a Serve replica that hosts one expert reads one expert, and
weights are mapped: on a CPU the page cache is their only copy.
"""

from paris_ray.bundle.facts import CONFIG, MODEL_INDEX, BundleFacts, facts_to_json
from paris_ray.bundle.layout import bundle_digest, load_bundle
from paris_ray.bundle.parts import Bundle, load_expert
from paris_ray.bundle.weights import Dtype

__all__ = [
    "CONFIG",
    "MODEL_INDEX",
    "Bundle",
    "BundleFacts",
    "Dtype",
    "bundle_digest",
    "facts_to_json",
    "load_bundle",
    "load_expert",
]
