"""The measurements behind ``check``, a file per group of rows."""
