"""The process level: Landlock, seccomp and rlimits around an ordinary process; needs no privilege."""
