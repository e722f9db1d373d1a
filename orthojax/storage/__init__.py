"""What a run leaves on disk, or in an object store: checkpoints, records, their directory."""
