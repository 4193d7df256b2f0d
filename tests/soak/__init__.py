"""The long form of the reliability tests: `make soak` (docs/reliability.md)."""
