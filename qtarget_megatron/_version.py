"""The version, for Python and for the build."""

__version__ = "0.1.0"
