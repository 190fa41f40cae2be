"""From a model to an accelerated network: trace, find sites, rewrite, fuse, verify."""
