"""Drop-in modules, and fuse / unfuse / explain for the models of others."""
