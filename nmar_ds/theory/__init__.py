"""What masking the deviations does, measured (SPEC section 4)."""
