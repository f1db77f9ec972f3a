"""A model folder in the layout of the public Paris release, as far as its documents tell.

    config.json  model_index.json  [README.md  manifest.json  history.json]
    expert_0/ ... expert_K-1/   config.json  diffusion_pytorch_model.safetensors
    router/                     config.json  pytorch_model.safetensors
    vae/                        diffusers' AutoencoderKL; or codec/, our own
    text_encoder/  [tokenizer/] transformers' CLIP; or MiniLM, which needs no second folder
    [clusters/]                 clusters.json: what each expert was trained on, for people
    [admissions/]               expert_K.json: signed verdicts on experts that came from strangers

The release itself is read as it is. Fields of our own stand under `paris_ray` in `config.json`.
Nothing here reads weights or imports torch: a process that only tells of a model needs neither.
`paris_ray.bundle` computes with it.
"""
