"""One pattern a file; each defines `PATTERN`. The folder is the registry."""
