"""Rows of a batch: columns, thought positions, arguments of a forward. Pure tensor functions, no models."""
