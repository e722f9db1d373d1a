"""Devices and processes: the mesh, who takes part, and what they share."""
