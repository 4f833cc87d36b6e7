"""Quantizers of Q, K and V: ``reference`` is the Torch twin of every kernel in ``triton``."""
