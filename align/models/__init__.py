"""Model families behind one small protocol. Importing this package loads no model library."""
