"""Forward attention on quantized operands: ``reference`` is the Torch twin of every kernel."""
