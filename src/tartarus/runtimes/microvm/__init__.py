"""The microVM level: each sandbox is a virtual machine of its own, with a kernel of its own, cloned from a saved one."""
