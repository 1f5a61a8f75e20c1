"""The papers' comparisons: what is run (the YAML files), how (run), what is kept of it (record), what it says (report)."""
