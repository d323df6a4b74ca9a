"""Batches: columns, thought positions and the arguments of a forward, as pure tensor functions without models."""
