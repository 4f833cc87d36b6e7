"""Packed keys and values: few bits a code, and attention that reads them as they are.

``layout``     codes of 8, 4, 3, 2 and 1 bit and of three levels as words; a token's row is its own
``quantize``   the codes: min-max, ternary and sign, in groups per token or per channel
``sides``      packed keys or values of one layer, as the kernels take them
``reference``  the Torch twin of the decode kernels, and the merging of parts
``triton``     packing, unpacking, merging; a decode kernel for every card
``gluon``      the decode kernel for NVIDIA cards: codes go from words to tensor cores in registers
"""
