"""How fast kernels are: timed on a card, or bounded from their machine code; and tuning."""
