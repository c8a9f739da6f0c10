"""Token store, windows over it, packed rows."""
