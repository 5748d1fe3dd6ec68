"""Reference networks: four small trained ones, and a zoo of architectures in `models.builders`."""
