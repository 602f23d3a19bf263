"""What a comparison shows: statistics, claims, tables, figures, the page."""
