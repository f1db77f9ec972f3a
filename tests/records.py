"""The record of a picture that an adapter helped to draw, and an expert was missing for."""

from paris_ray.pictures import LoRARecord, PictureRecord, Sampling

RECORD = PictureRecord(
    software="paris_ray 0",
    model="tiny",
    bundle="0" * 64,
    dtype="bfloat16",
    prompt='a "cat" \U0001f431 ${HOME} \x01',
    seed=2**63 - 1,
    sampling=Sampling(
        num_inference_steps=3,
        solver="ab2",
        time_grid="half-last",
        guidance_scale=1.5,
        routing="top-2",
        lora="mine",
    ),
    lora=LoRARecord(expert=1, sha256="1" * 64, merge=False),
    native_size=32,
    size=32,
    resize_filter=None,
    output_compression=None,
    expert_weights=[{0: 0.25, 2: 0.75}, {1: 1.0}],
    missing_experts=[3],
    last_resort=True,
    unfinished_at=None,
    attribution="\u00a9 nobody",
)
