"""Where agents' commands run: a protocol, and its backends."""
