"""Training in two stages on Transformers' Trainer, and of grounding."""
