"""Streams composed of captioned pictures, with questions about them; used by training and evaluation."""
