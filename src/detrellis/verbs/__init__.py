"""The verbs of the Python interface, a file for each kind; `api` is the list of them."""
