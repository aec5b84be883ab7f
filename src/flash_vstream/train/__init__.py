"""Training: two stages on Transformers' Trainer, plus the grounding module."""
