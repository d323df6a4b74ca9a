"""Adapter files: validation of untrusted files, and the model card."""
