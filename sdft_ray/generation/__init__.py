"""Self-data: the rewriting prompt, the samplers that answer it, and the choice of what to train on."""
