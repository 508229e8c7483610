"""Where a published mixture's pictures come from and how many there are (package data)."""
