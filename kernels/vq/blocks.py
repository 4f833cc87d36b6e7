"""Nearest code in Torch, for CPUs: as fast as the matrix product, in a few MiB.

A maximum with its index costs more than the product where D is small.  So codes are scored in
blocks of 64, of which only the maximum is kept (a vertical ``amax``), and ids are looked for in the
best block of each latent alone.  The bias rides in the product as one more column.

The product rounds, and a BLAS rounds equal codes differently in different places.  Blocks and codes
within the rounding error of the best are therefore scored again in float64, so that the result is
the exact best of the given numbers and equal codes give the lowest id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import Terms

#: Latents and codes of a tile: 1 MiB of scores, which a core keeps to itself until their maxima.
LATENTS, CODES, BLOCK = 1024, 256, 64

#: Block maxima that are held at a time: 16 MiB.
_MAXIMA = 1 << 22

#: Elements of codes that are gathered at a time: 4 MiB.
_GATHERED = 1 << 20


def nearest_code(z: Tensor, table: Tensor, terms: Terms) -> Tensor:
    """Ids ``[N]``, int64, of the codes with the largest score.

    Args:
        z: ``[N, D]``, finite, any floating dtype.
        table: ``[K, D]``, finite, on the same device.
        terms: scale and bias of the codes.

    Raises:
        ValueError: scores overflow float32.
    """
    ids = torch.empty(len(z), dtype=torch.int64, device=z.device)
    sizes = _largest(table, terms)
    step = max(64, min(LATENTS, _MAXIMA * BLOCK // len(table)))
    for start in range(0, len(z), step):
        some = z[start : start + step].float()
        ids[start : start + step] = _search(some, table, terms, *sizes)
    return ids


def _largest(table: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Largest norm of a scaled code, and largest absolute bias."""
    zero = torch.zeros((), device=table.device)
    bias = zero if terms.bias is None else terms.bias.abs().amax()
    norms = zero
    for start in range(0, len(table), CODES):
        some = table[start : start + CODES].float().norm(dim=1)
        if terms.scale is not None:
            some = some * terms.scale[start : start + CODES]
        norms = torch.maximum(norms, some.amax())
    return norms, bias


def _search(z: Tensor, table: Tensor, terms: Terms, code_norm: Tensor, bias: Tensor) -> Tensor:
    """One tile of latents, float32, given the largest norm of a code and the largest bias."""
    maxima = _block_maxima(z, table, terms)
    # A sum of n products is off by at most 8 sqrt(n) u |z| |c| but with probability 1e-13 (Higham
    # and Mary, 2019, A New Approach to Probabilistic Rounding Error Analysis).  Here that counts
    # twice, for the best and for the other, and u is eps / 2.
    share = 8.0 * (z.shape[1] + 2) ** 0.5 * torch.finfo(torch.float32).eps
    best = maxima.amax(0)
    if not bool(torch.isfinite(best).all()):
        raise ValueError("scores must fit into float32, got values that overflow it")
    floor = best - share * (z.norm(dim=1) * code_norm + bias)
    if terms.bias is None:  # a latent of zeros scores all codes alike
        maxima[1:, ~z.any(1)] = -torch.inf
    latent, block = (maxima >= floor).t().nonzero(as_tuple=True)
    del maxima
    latents, codes = [], []
    step = max(1, _GATHERED // (BLOCK * z.shape[1]))
    for i in range(0, len(latent), step):
        rows = latent[i : i + step]
        ids = block[i : i + step, None] * BLOCK + torch.arange(BLOCK, device=z.device)
        inside = ids < len(table)
        ids = ids.clamp_(max=len(table) - 1)
        scores = torch.bmm(table[ids].float(), z[rows, :, None])[..., 0]
        if terms.scale is not None:
            scores *= terms.scale[ids]
        if terms.bias is not None:
            scores += terms.bias[ids]
        near = ((scores >= floor[rows, None]) & inside).nonzero(as_tuple=True)
        latents.append(rows[near[0]])
        codes.append(ids[near])
    return _exact(z, table, terms, torch.cat(latents), torch.cat(codes))


def _block_maxima(z: Tensor, table: Tensor, terms: Terms) -> Tensor:
    """Largest score of every block of codes, ``[blocks, N]``."""
    count, dim = table.shape
    with_bias = int(terms.bias is not None)
    width = dim + with_bias
    operand = z.new_ones(width, len(z))
    operand[:dim] = z.t()
    rows = z.new_empty(CODES, width)
    scores = z.new_empty(CODES, len(z))
    maxima = z.new_empty(-(-count // BLOCK), len(z))
    for start in range(0, count, CODES):
        codes = table[start : start + CODES]
        tile = rows[: len(codes)]
        tile[:, :dim] = codes
        if terms.scale is not None:
            tile[:, :dim] *= terms.scale[start : start + CODES, None]
        if terms.bias is not None:
            tile[:, dim] = terms.bias[start : start + CODES]
        found = torch.mm(tile, operand, out=scores[: len(codes)])
        whole, first = len(codes) // BLOCK, start // BLOCK
        if whole:
            blocks = found[: whole * BLOCK].view(whole, BLOCK, len(z))
            torch.amax(blocks, 1, out=maxima[first : first + whole])
        if len(codes) % BLOCK:
            maxima[-1] = found[whole * BLOCK :].amax(0)
    return maxima


def _exact(z: Tensor, table: Tensor, terms: Terms, latent: Tensor, code: Tensor) -> Tensor:
    """Of candidate pairs the best code per latent, in float64; the lowest of equal ones."""
    if len(latent) == len(z):  # one candidate each, already in order
        return code
    scores = torch.empty(len(latent), dtype=torch.float64, device=z.device)
    step = max(1, _GATHERED // z.shape[1])
    for i in range(0, len(latent), step):
        n, k = latent[i : i + step], code[i : i + step]
        product = (z[n].double() * table[k].double()).sum(1)
        scores[i : i + step] = terms.exact(table, k, product)
    best = scores.new_full((len(z),), -torch.inf).scatter_reduce_(0, latent, scores, "amax")
    code = code.masked_fill(scores < best[latent], len(table))
    ids = code.new_full((len(z),), len(table))
    return ids.scatter_reduce_(0, latent, code, "amin")
