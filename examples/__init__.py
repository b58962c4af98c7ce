"""Scripts that show selfdoubt at work, each of which can be read and run alone."""
