"""A config built into programs, and the loop that runs them."""
