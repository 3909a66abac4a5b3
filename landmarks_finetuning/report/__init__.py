"""The report of a study: run folders in, one self-contained HTML page, tables and figures out."""
