r"""Turn an ImageNet DiT into an expert to start training from.

    python -m jobs.convert_dit DiT-XL-2-256x256.pt --output experts/from_dit
    python -m jobs.pipeline --config paris_xl2 \
        training.init_from=$PWD/experts/from_dit training.learning_rate=2e-5

CHECKPOINT is one of facebookresearch/DiT, .pt or .safetensors: a state dict, or what its trainer
saves (the key ema is taken, else model). Patches, positions, self-attention and MLPs are DiT's;
text and output are new, and silent until trained. Prints what became of every tensor.

DiT's weights are CC BY-NC 4.0: not for commercial use, and nor is what is made from them.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import safetensors.torch

from jobs.command import fail
from paris_ray.config.release import write_document
from paris_ray.errors import ArtifactError, ParisError
from paris_ray.folders import Folder
from paris_ray.models.convert import (
    CLIP_WIDTH,
    IMAGENET_CLASSES,
    ClassEmbedding,
    TensorGroup,
    convert_dit,
    read_dit,
)
from paris_ray.models.expert import Expert
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG

NOTES = "conversion.txt"
LICENCE = (
    "WARNING: the weights of DiT are licensed CC BY-NC 4.0 (no commercial use). This expert is\n"
    "made from them: that licence holds for it, and for whatever is trained from it."
)


def main() -> int:
    """Convert a checkpoint; return the exit code."""
    arguments = _parser().parse_args()
    try:
        output = Folder(arguments.output)
        if output.files():
            raise ArtifactError(f"--output={output.uri} is not empty: choose another folder")
        checkpoint = read_dit(arguments.checkpoint)
        conversion = convert_dit(
            checkpoint.state,
            num_heads=arguments.num_heads,
            num_classes=arguments.num_classes,
            class_embedding=arguments.class_embedding,
            text_embed_dim=arguments.text_embed_dim,
            seed=arguments.seed,
        )
        source = f"weights of the checkpoint: {checkpoint.source}"
        notes = f"{source}\n{_table(conversion.groups)}\n\n{LICENCE}\n"
        _write(output, conversion.expert, notes)
    except ParisError as error:
        return fail(error)
    print(notes)
    print(f"written to {output.uri}\nto train from it: training.init_from={output.uri}")
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=".pt or .safetensors")
    result.add_argument(
        "--output", metavar="FOLDER", required=True, help="a new or empty folder for the expert"
    )
    result.add_argument(
        "--class-embedding",
        choices=get_args(ClassEmbedding),
        default="null",
        help="what stands for DiT's class: the null class, or the mean of all (default: null)",
    )
    result.add_argument(
        "--num-classes",
        type=int,
        default=IMAGENET_CLASSES,
        help=f"of DiT, without the null class (default: {IMAGENET_CLASSES})",
    )
    result.add_argument(
        "--num-heads", type=int, help="needed for a width that no published DiT has"
    )
    result.add_argument(
        "--text-embed-dim",
        type=int,
        default=CLIP_WIDTH,
        help=f"width of the text encoder to train with (default: {CLIP_WIDTH}, CLIP ViT-L/14)",
    )
    result.add_argument("--seed", type=int, default=0, help="of the new tensors (default: 0)")
    return result


def _write(output: Folder, expert: Expert, notes: str) -> None:
    """Write an expert as training does, and with it the licence that it carries."""
    output.write(NOTES, notes.encode())
    output.write(EXPERT_WEIGHTS, safetensors.torch.save(expert.state_dict()))
    output.write_json(MODEL_CONFIG, write_document(expert.config))


def _table(groups: Sequence[TensorGroup]) -> str:
    """Return what became of each group of tensors, by treatment."""
    total = sum(group.num_parameters for group in groups)
    lines = []
    for treatment, part in itertools.groupby(groups, key=lambda group: group.treatment):
        members = list(part)
        share = sum(group.num_parameters for group in members)
        lines.append(f"{treatment}: {share:,} of {total:,} parameters")
        lines += [_line(group) for group in members]
    return "\n".join(lines)


def _line(group: TensorGroup) -> str:
    shape = " x ".join(map(str, group.shape))
    tensors = f"{group.count} of {shape}" if group.count > 1 else shape
    return f"  {group.name:35}  {tensors:17}  {group.num_parameters:>11,}  {group.source}"


if __name__ == "__main__":
    sys.exit(main())
