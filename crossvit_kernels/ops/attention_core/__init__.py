"""Attention of arbitrary queries u over tokens that are LayerNorm-ed on the fly."""
