"""`python -m detrellis`."""

from detrellis.cli import main

main()
