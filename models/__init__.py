"""Reference networks: three small trained ones, and a zoo of architectures in `models.builders`."""
