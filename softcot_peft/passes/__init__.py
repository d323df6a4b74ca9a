"""Kinds of passes: what happens in one forward of the base. The hooks choose one; `generate` wraps the base's."""
