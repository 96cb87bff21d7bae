"""A tiny random CLIP with its processor on disk, for every test that reads photographs or measures CLIP scores."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import MAX_TOKENS, tiny_tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def save_tiny_clip(folder: Path) -> Path:
    """Write a CLIP of 16 channels for 32 px images into ``folder``."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**tower, **special, "vocab_size": 256, "max_position_embeddings": MAX_TOKENS}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, **special))
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tiny_tokenizer()).save_pretrained(folder)
    return folder
