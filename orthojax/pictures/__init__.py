"""Pictures without pyplot: a frame of their own, and training curves."""
