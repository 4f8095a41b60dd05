"""The model side: segments, attention, objective, vocabulary, loading, canary."""
