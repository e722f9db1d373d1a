"""What `launch/benchmark.py` measures, and how: timing, costs, figures with their spread."""
