"""Stores, packing, and the loader. No torch."""
