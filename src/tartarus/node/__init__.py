"""The daemon of one host: it makes sandboxes, watches them and ends them (Hecatoncheir).

The control plane calls `service.Node`; nothing below it knows of tenants' identities or of HTTP.
"""
