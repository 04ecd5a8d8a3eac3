"""The node's egress proxy: what contracts' domains are reached through, with the names that are spoken checked.

One confined process reads what sandboxes send (`server`, `tunnels`, `web`); the daemon decides (`judge`) and keeps it
running (`proxy`). They talk by `messages`. What is read of foreign bytes is read by pure functions (`hello`, `heads`).
"""
