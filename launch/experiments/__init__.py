"""The tables and figures: each module has `jobs(options)` and `report(options, results)`."""
