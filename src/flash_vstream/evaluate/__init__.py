"""Measuring what a model knows about streams."""
