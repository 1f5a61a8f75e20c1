"""Benchmarks of every operation: the ``benchmarks`` of its case, checked first, then timed and recorded.

``python -m ssmscan.bench`` needs PyTorch alone; rich and matplotlib, when installed, make the tables and plots. Whole
models, in ``models``, need the extra ``train``.
"""
