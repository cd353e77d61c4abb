"""One file per command: a typed function whose signature is its options, and a `main` that parses them."""
