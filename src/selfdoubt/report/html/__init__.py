"""The HTML page of a report, one file without any other."""
