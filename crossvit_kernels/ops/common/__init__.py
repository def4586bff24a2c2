"""Shared by layernorm_msa and layernorm_ffn: LayerNorm and linear layers over tokens."""
