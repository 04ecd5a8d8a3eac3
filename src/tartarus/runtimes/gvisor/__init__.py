"""The gVisor level: a kernel of its own in user space between a sandbox and the host's."""
