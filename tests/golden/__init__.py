"""Golden files: each stored format and each reply that users and other programs see, held as it is."""
