"""x + MSA(LN(x)): the first half of a transformer block."""
