"""Attention pooling: one or a few queries over many tokens, with all projections."""
