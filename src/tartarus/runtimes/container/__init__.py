"""The container level: namespaces, a user-mapped root, an overlay, cgroup, seccomp and Landlock."""
