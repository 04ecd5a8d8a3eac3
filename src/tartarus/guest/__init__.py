"""What lives inside every sandbox, and the host's end of it.

The agent (C, `agent/`), the warm runner (`runner.py`), the wire protocol (`protocol.py`,
docs/guest-protocol.md) and the host's side of the channel (`channel.py` and its neighbours). Runtimes
start guests with it and the node talks through it, because every isolation kind must answer alike.
"""
