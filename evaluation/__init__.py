"""Evaluation tasks: files for lm-evaluation-harness, and what reads the answers out of what models write."""
