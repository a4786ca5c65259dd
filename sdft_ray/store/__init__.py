"""The artifact store: content-derived addresses, manifests written last, nothing overwritten."""
