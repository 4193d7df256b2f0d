"""Trained detectors on the Hugging Face Hub."""
