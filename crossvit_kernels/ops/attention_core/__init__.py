"""Attention of any score rows u over tokens that are LayerNorm-ed on the fly."""
