"""What others published of their own systems, on their own machines, for bench_zklora.py."""

# Roy et al. 2025 (arXiv 2501.13965), hardware not stated: 15 rows; seconds per module.
LORA_MODULES = (
    ("distilgpt2", 24, 24_576, 38.0, 12.5, 31.6, 0.69),
    ("gpt2", 48, 49_152, 43.6, 15.8, 34.9, 0.68),
    ("Llama-3.2-1B", 32, 26_624, 37.2, 12.4, 31.0, 0.78),
    ("Llama-3.1-8B", 32, 163_840, 57.4, 19.4, 47.7, 1.12),
    ("Llama-3.3-70B", 80, 147_456, 54.9, 18.0, 46.9, 1.54),
    ("Mixtral-8x7B", 32, 327_680, 86.1, 29.7, 73.7, 1.38),
)

# What others say of themselves, on their machines: weights, and CPU or wall seconds as they count
# them. Repositories and arXiv 2602.17452; GPT-2 has 124 million parameters, a layer 7.1 million.
OTHER_SYSTEMS: tuple[tuple[str, int, float | None, float | None, float | None], ...] = (
    ("Jolt Atlas: GPT-2, a forward pass", 124_000_000, 14.9, 1.04, None),
    ("NANOZK: GPT-2, one layer", 7_100_000, None, 0.022, 6_900),
    ("DeepProve: Gemma3-270M, a token", 270_000_000, 2.0, None, None),
)
