"""Records to traces: roles, reduction, encoding, builders. No torch."""
