"""What LayerNorm-MSA and LayerNorm-FFN share on a GPU: LayerNorm and linear layers over tokens."""
