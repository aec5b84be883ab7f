"""Streams composed of captioned pictures, and questions about them: training and evaluation both build on it."""
