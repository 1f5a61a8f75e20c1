"""Experiments with whole models, and the figures of the Mamba papers: ``ssmscan bench models``."""
