"""The version of the package, in its one place: pyproject.toml reads it, `hpc_moe.__version__` shows it."""

__version__ = "0.1.0"
