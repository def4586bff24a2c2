"""The fusion of one CrossViT branch: f, LayerNorm, cross-attention, residual, g."""
