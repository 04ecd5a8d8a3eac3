"""Enforcement (Erinyes): limits that are reached are noticed as the kernel says so, and answered as policies say."""
