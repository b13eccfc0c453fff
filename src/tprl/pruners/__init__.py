"""Who survives: one file per method, each a `tprl.types.Pruner`."""
