"""Many devices: how they are arranged, and which part of every array each of them holds."""
