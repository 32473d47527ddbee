"""Tasks with a verifier, to distil on and to measure."""
