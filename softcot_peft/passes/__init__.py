"""Passes: what happens in one forward of the base, by kind. The hooks choose a kind; `generate` wraps the base's."""
