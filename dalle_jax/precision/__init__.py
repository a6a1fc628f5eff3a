"""Numbers of few bits: gradient scaling for float16, and small formats."""
