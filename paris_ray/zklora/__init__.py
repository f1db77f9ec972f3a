"""ZKLoRA: a LoRA is tried, proved, paid for and received without being shown before.

Source: Roy et al. 2025, arXiv 2501.13965, for the setting; docs/zklora.md for the scheme.
"""
