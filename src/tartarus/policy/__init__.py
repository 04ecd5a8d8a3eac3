"""May this happen? Rules, decisions and capability tokens (Themis). Nothing else in Tartarus says allow."""
