"""Files that only the type checker runs."""
