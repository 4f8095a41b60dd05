"""Decoding with undo, probes, metrics."""
