"""Files of our own: atomic writes, locks, checksums, and readers that trust nothing. Knows nothing of what the files mean."""
