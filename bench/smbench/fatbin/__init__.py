"""Device code inside shared objects: what compute capabilities a file holds, and how to keep only one of them.

`container` knows the bytes of a fatbin container, `selection` what a device loads of it, `sharedobject` where a shared
object keeps containers, `strip` how a file is rewritten safely, `survey` what a wheel holds. `python -m smbench.fatbin`
is the command. The package needs nothing but the standard library, so that it runs in a bare build stage.
"""
