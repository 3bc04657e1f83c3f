"""What a result looks like: reports, tables, pictures, videos and records."""
