"""From datasets to tokens: reading, validating, encoding, caching and ordering preference pairs."""
