"""The papers' comparisons: what is run (YAML files), how (run), what is kept of it (record), what it says (report)."""
