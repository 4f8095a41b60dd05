"""Ranks, engine, loop, checkpoints, export."""
