"""Streams that are watched as they happen: worker processes around shared, immutable states. Knows nothing of HTTP."""
