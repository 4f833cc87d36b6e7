"""What quantization costs: metrics, reports, and running twice to compare."""
