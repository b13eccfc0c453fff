"""TPRL inside other people's programs; each file needs a package that TPRL itself does not."""
