"""What work needs of a machine, from architecture and settings: memory, before anything starts. No torch, no Ray."""
