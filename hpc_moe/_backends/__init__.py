"""Backends: what runs the calls. `requests.py` says what they get; each backend is a package or module of its own."""
