"""What converting SmolLM2 to one latent for all heads (TransMLA) costs without fine-tuning.

    python -m benchmarks.kv_transmla

Model, calibration topics and scored text are those of ``benchmarks.kv``; 640 tokens are scored, all
that is before them converted, no token exact.  "By number" gives RoPE to the first component of
every frequency, as the paper does, "by weight" to those whose scores lose most without it.
"""

from __future__ import annotations

import torch

from benchmarks.kv import calibration_texts, scored_text, smollm2
from sage_diffusion.integrations.transformers.transmla import convert, cost, full_rank, measure
from sage_diffusion.kv.transmla import Sizes

TOKENS = 640

SIZES = ((256, 128), (256, 64), (192, 96), (128, 64))


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    chunks = [
        part
        for text in calibration_texts()
        for part in tokenizer(text, return_tensors="pt").input_ids[0].split(TOKENS)
        if part.numel() == TOKENS
    ]
    moments, ids = measure(model, chunks), scored_text(tokenizer, None)[:TOKENS]
    print("| latent + RoPE | kept | RoPE | KL, RoPE alone | KL | top-1 | ppl (before) |")
    print("|---|---|---|---|---|---|---|")
    for rank, rope in SIZES:
        for by_weight in (False, True):
            made = convert(model, moments, Sizes(rank, rope), by_weight=by_weight)
            whole = full_rank(made.sizes, made.width)
            partial = convert(model, moments, whole, by_weight=by_weight)
            found = cost(model, ids, made, partial)
            at, chosen = found.whole, "by weight" if by_weight else "by number"
            print(
                f"| {rank} + {rope} | {found.numbers / found.before:.0%} | {chosen} "
                f"| {found.partial.kl:.3f} | {at.kl:.3f} | {at.top1:.3f} | {at.perplexity:.2f} "
                f"({at.exact_perplexity:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
