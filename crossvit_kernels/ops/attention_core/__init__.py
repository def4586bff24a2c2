"""Attention of any queries u over tokens that are LayerNorm-ed on the fly."""
