"""What a guest may no longer do: filters, rulesets, capabilities and limits as program operations.

The runtimes call these builders while they write a guest's syscall program; only metadata.py acts while a
guest runs. One place for all of it, because a wall is only as good as the one beside it.
"""
