"""Small language models in folders, as people have them: shards, tokenizer, adapters of PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

TEXTS = ("once upon a time", "there was a small house", "in the dark wood by the sea")


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer whose tokens are bytes; return how many there are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(alphabet)


def write_llama(folder: Path, shard_size: str = "60KB") -> LlamaForCausalLM:
    """Write a Llama with random weights, in several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def write_gpt2(folder: Path) -> GPT2LMHeadModel:
    """Write a GPT-2 with random weights in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=write_tokenizer(folder), n_positions=64, n_embd=32, n_layer=2, n_head=2
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def write_lora(model: nn.Module, folder: Path, *targets: str, **options: Any) -> nn.Module:
    """Write a LoRA with random weights; return the adapted model, as PEFT has it."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False, **options
    )
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    return adapted
