"""Nearest code: ``argmax over k of (z . c_k) * scale_k + bias_k``, the lowest of equally good k.

``terms``      scale and bias of the metrics l2, cosine and dot
``blocks``     in Torch for CPUs: maxima of blocks of codes first, ids only in the best blocks
``reference``  the Torch twin of the kernel, tile by tile
``triton``     the kernel: split over the codes, tile maxima in the main loop, ids in one tile
"""
