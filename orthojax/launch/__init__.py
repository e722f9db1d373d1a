"""Programs: `python -m orthojax.launch.train` and its siblings."""
