"""The command line: one file per command group, no logic of its own; it calls the SDK.

`main` is the entry. `run` and `exec` take the short way (`options`, `quick`, `launch`, `relay`), which imports neither
click nor msgspec; everything else goes through click (`app`).
"""
