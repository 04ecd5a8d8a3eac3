"""What a guest may no longer do: filters, rulesets, capabilities and limits as program operations.

The runtimes call these builders while they write a guest's syscall program; nothing here acts on the
machine it runs on. One place for all of it, because a wall is only as good as the one beside it.
"""
