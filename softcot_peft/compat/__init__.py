"""Workarounds for differences between models, releases of transformers and engines, each with its reason."""
