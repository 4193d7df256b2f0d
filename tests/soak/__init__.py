"""Long tests: `make soak`, which docs/reliability.md is about, and `make long`."""
