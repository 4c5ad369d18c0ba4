"""Images: `python -m smbench.images`, behind `make image`. Needs a checkout; reading and measuring need none of it."""
