"""What `predict` reads, finds and leaves on disk."""
