"""What a conversion kept: scores against the base, and reports."""
