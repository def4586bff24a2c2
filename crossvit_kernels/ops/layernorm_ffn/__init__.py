"""x + FFN(LN(x)): the second half of a transformer block."""
