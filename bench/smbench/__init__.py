"""smbench: repeat published LLM-inference measurements, trust the numbers, send them home in one file."""

__version__ = "0.1.0"
