"""The microVM level: each sandbox is a virtual machine with a kernel of its own, cloned from a saved one."""
