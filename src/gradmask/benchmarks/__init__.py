"""Speed, as ratios: gradmask against a plain pass and against other libraries."""
