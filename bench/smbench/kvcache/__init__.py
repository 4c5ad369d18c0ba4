"""Images with TensorRT-LLM: NVIDIA's release with smbench on it, and document 003's build with the HSTU KV cache.

`table` reads docker/kvcache.toml, `needs` says whether this machine can, `sources` finds the repositories, `steps` is
the build as a list of commands, `layer` what is laid on top, `__main__` runs it all. Needs a checkout of smbench.
"""
