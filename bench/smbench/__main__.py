"""`python -m smbench` is the `smbench` command, for places where no script is installed."""

from smbench.cli import main

main()
