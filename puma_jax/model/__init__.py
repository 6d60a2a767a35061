"""The model: vision tower, decoder, LoRA, and Hugging Face weights in and out."""
