"""Tensors and number formats: quantizers and attention, each kernel beside its Torch twin.

``formats``    number formats and the containers of quantized tensors
``spec``       :class:`AttentionSpec`, the numerics of one attention call
``quantize``   smoothing, rotation, clipping, INT8 / INT4 / FP8 / FP4 quantizers
``attention``  one forward kernel and its twin
``vq``         nearest-code search

Nothing here knows of layers, timesteps or models, and importing it does not import Triton.
"""
