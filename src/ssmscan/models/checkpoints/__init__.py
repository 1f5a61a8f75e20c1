"""Checkpoints of others' models, read and written."""
