"""Evaluate how well a model answers questions about streams."""
