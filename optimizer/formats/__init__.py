"""How other tools store quantized weights: one module a format, each reading a module's tensors into our layout."""
