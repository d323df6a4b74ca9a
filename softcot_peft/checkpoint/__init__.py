"""Adapter files: reading those of strangers, and the model card of one's own."""
