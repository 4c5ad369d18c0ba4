"""The only code that runs inside an image: it measures cells and reports over one stream of JSON lines.

Imports the standard library, torch and the kernels; never typer, jinja2, docker or the host's modules.
"""
