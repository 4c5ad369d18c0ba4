"""Own GPU kernels and the operations they implement.

Owns: operations, their truth, their providers, tuned configurations. Does not own: timing, files of results, reports.
Nothing here imports `smbench`.
"""
