"""Quantization: what (schemes and recipes), which codes (algorithms), and the rewrite."""
