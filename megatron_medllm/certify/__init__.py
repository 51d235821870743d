"""Proves a layout on CPUs: many processes over gloo compute what one process does, and what transformers does."""
