"""The four published encoders: how query tokens, or vertices, come from a feature map."""
