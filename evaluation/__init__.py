"""Evaluation tasks for lm-evaluation-harness, and the extraction of answers from generated text."""
